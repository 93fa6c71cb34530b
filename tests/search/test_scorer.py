"""The score of a subnet, with batch statistics and with calibrated ones, against plain calls and the engine's."""

from __future__ import annotations

import random

import pytest
import search_cases as cases
import torch
from torch import nn

import fastslim
from fastslim.search.held_batches import HeldBatches
from fastslim.search.scorer import CALIBRATION_SAMPLES, SubnetScorer


def likelihood(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -nn.functional.cross_entropy(output, targets, reduction="none")


@pytest.fixture
def algo() -> fastslim.AutoSlim:
    return cases.toy_algo().double()


@pytest.fixture
def data() -> list:
    return [(images.double(), labels) for images, labels in cases.toy_data(3)]


def in_order(choices: dict[str, int]) -> list[int]:
    """Widths around the addition, inside it and at the end."""
    return [next(width for name, width in choices.items() if key in name) for key in ("first", "inner", "last")]


def test_without_calibration_each_batch_has_its_own_statistics(algo, data) -> None:
    with SubnetScorer(algo, data, metric=likelihood) as scorer:
        for _ in range(6):
            subnet = algo.sample_subnet()
            logits = [cases.plain_logits(algo.architecture, x, *in_order(subnet)) for x, _ in data]
            expected = torch.cat([likelihood(y, t) for y, (_, t) in zip(logits, data, strict=True)]).mean()
            assert scorer(subnet) == pytest.approx(expected.item(), abs=1e-12)


def test_calibrated_statistics_are_those_of_calibrate_batch_norm(algo, data) -> None:
    training = [(images.double(), labels) for images, labels in cases.toy_data(4, seed=7)]
    with SubnetScorer(algo, data, metric=likelihood, calibration=training) as scorer:
        subnets = [algo.sample_subnet() for _ in range(6)]
        scores = [scorer(subnet) for subnet in subnets]
        assert scores == [scorer(subnet) for subnet in subnets], "nothing is left of the subnets in between"
    fastslim.calibrate_batch_norm(algo, training, subnets)
    algo.eval()
    for subnet, score in zip(subnets, scores, strict=True):
        algo.set_subnet(subnet)
        with torch.no_grad():
            expected = torch.cat([likelihood(algo(images), labels) for images, labels in data]).mean()
        assert score == pytest.approx(expected.item(), abs=1e-12)


class NormAct(nn.BatchNorm2d):
    """A batch norm with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W), normalised and rectified."""
        if self.training:
            self.num_batches_tracked.add_(1)
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        ).relu()


class BehindAConcat(nn.Module):
    """The active channels of the norm are two segments."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 8, 3), nn.Conv2d(1, 6, 3)
        self.norm, self.mix = NormAct(14), nn.Conv2d(14, 8, 1)
        self.last, self.head = nn.BatchNorm2d(8), nn.Linear(8, cases.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 1, 6, 6) -> (N, classes)."""
        x = self.norm(torch.cat([self.left(x), self.right(x)], 1))
        return self.head(self.last(self.mix(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("calibrated", [True, False])
def test_norms_behind_a_concat_and_with_a_forward_of_their_own_are_scored_alike(calibrated, data) -> None:
    torch.manual_seed(0)
    algo = fastslim.AutoSlim(
        architecture=BehindAConcat().double(), example_inputs=data[0][0], divisor=1, choices=[0.25, 0.5, 1]
    )
    assert isinstance(algo.architecture.norm, NormAct)
    before = cases.snapshot(algo)
    data = data[:1]  # calibrated on the very batch that is scored: the same as its own statistics but for n - 1
    with SubnetScorer(algo, data, metric=likelihood, calibration=data if calibrated else None) as scorer:
        subnets = [algo.sample_subnet() for _ in range(5)]
        scores = [scorer(subnet) for subnet in subnets]
    cases.assert_unchanged(algo, before)
    fastslim.calibrate_batch_norm(algo, data, subnets)
    algo.eval()
    for subnet, score in zip(subnets, scores, strict=True):
        algo.set_subnet(subnet)
        with torch.no_grad():
            expected = likelihood(algo(data[0][0]), data[0][1]).mean().item()
        assert score == pytest.approx(expected, abs=1e-12 if calibrated else 2e-3)


def test_calibration_changes_the_score(algo, data) -> None:
    scores = []
    for calibration in (None, cases.toy_data(2, seed=7)):
        calibration = calibration and [(images.double(), labels) for images, labels in calibration]
        with SubnetScorer(algo, data, metric=likelihood, calibration=calibration) as scorer:
            scores.append(scorer(algo.mutator.min_choices))
    assert scores[0] != scores[1]


def test_a_thousand_samples_are_enough_to_calibrate_and_a_number_of_batches_is_kept(algo, data) -> None:
    many = [data[0]] * 100
    by_default = SubnetScorer(algo, data, calibration=many)
    assert len(by_default.calibration.batches) == -(-CALIBRATION_SAMPLES // cases.BATCH)
    assert len(SubnetScorer(algo, data, calibration=many, calibration_batches=3).calibration.batches) == 3
    assert SubnetScorer(algo, many, num_batches=5).validation.samples == 5 * cases.BATCH


def test_switchable_statistics_are_scored_and_put_back(data) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3))
    mutator = fastslim.mutators.SlimmableChannelMutator(example_inputs=torch.randn(2, 1, 6, 6))
    mutator.unit_default_args["divisor"] = 2
    mutator.prepare_from_supernet(net)
    algo = fastslim.algorithms.SlimmableAlgorithm(net)
    algo.mutator = mutator
    data = [(images.float(), labels) for images, labels in data]
    before = cases.snapshot(algo)
    with SubnetScorer(algo, data, metric=likelihood, calibration=data) as scorer:
        scores = {scorer(subnet) for subnet in mutator.subnets}
    assert len(scores) == len(mutator.subnets) == 4
    cases.assert_unchanged(algo, before)


def test_the_digest_changes_with_any_value_and_with_nothing_else(algo, data) -> None:
    def digest(batches: list) -> str:
        return HeldBatches(algo, batches, what="validation", argument="num_batches").digest

    again = [(images.clone(), labels.clone()) for images, labels in data]
    assert digest(data) == digest(again)
    again[1][1][3] = 1 - again[1][1][3]
    assert digest(data) != digest(again)
    assert digest(data) != digest(data[:2])


def test_a_shuffling_loader_gives_the_same_batches_for_the_same_seed(algo, data) -> None:
    images, labels = data[0]

    class Augmented(torch.utils.data.TensorDataset):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            image, label = super().__getitem__(index)
            return image + random.random() + torch.rand(()), label

    loader = torch.utils.data.DataLoader(Augmented(images, labels), batch_size=8, shuffle=True)
    digests = []
    for seed in (0, 0, 1):
        held = HeldBatches(algo, loader, what="calibration", argument="calibration_batches", seed=seed)
        digests.append(held.digest)
        torch.rand(1), random.random()  # what else is drawn does not matter
    assert digests[0] == digests[1] != digests[2]
