"""The networks of the AutoSlim paper's search space as supernets: nearly all of them slims, and exactly."""

from __future__ import annotations

import pytest
import torch

import fastslim
from fastslim.models import create_model
from fastslim.models.mnasnet import BN_MOMENTUM

PAPER = ("mobilenet_v1", "mobilenet_v2", "mnasnet")


@pytest.mark.parametrize("name", PAPER)
def test_nearly_all_multiply_adds_get_fewer_with_the_width(name: str) -> None:
    report = fastslim.convert(create_model(name), torch.zeros(1, 3, 64, 64))
    assert report.share >= 0.9
    assert [finding.reason for finding in report.full_width] == ["the model's output"]


@pytest.mark.parametrize("name", ["mobilenet_v1", "mnasnet"])
def test_the_fast_step_is_exact_and_learns(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, small_images=True, width_mult=0.25)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    algo = fastslim.AutoSlim(architecture=model, example_inputs=images, choices=[0.5, 0.75, 1.0], divisor=4, seed=0)
    assert fastslim.verify(algo, (images, labels))
    optimizer = torch.optim.Adam(algo.parameters(), lr=0.003)
    losses = [algo.train_step((images, labels), optimizer)["max_subnet.loss"] for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]


def test_mnasnet_keeps_the_published_momentum_of_its_statistics() -> None:
    model = create_model("mnasnet")
    assert {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {BN_MOMENTUM}
    assert pytest.approx(0.0003) == BN_MOMENTUM
