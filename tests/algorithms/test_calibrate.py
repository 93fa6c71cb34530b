"""Statistics of batch normalisation, calibrated for each subnet."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from autoslim_cases import batch, make, state
from torch import nn

import fastslim
from fastslim import errors


def test_calibration_gives_each_subnet_its_own_statistics() -> None:
    algo = make()
    optimizer = torch.optim.SGD(algo.parameters(), lr=0.05)
    for _ in range(3):
        algo.train_step(batch(), optimizer)
    loader = [batch(8)]
    subnets = [algo.mutator.max_choices, algo.mutator.min_choices]
    running = state(algo)
    fastslim.calibrate_batch_norm(algo, loader, subnets)
    assert all(torch.equal(value, running[key]) for key, value in state(algo).items())
    assert algo.training
    for choices in subnets:
        algo.train()
        algo.set_subnet(choices)
        with (
            torch.no_grad()
        ):  # one batch of data: calibrated evaluation is training mode but for the variance's n/(n-1)
            expected = copy.deepcopy(algo)(batch()[0])
        algo.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y = algo(batch()[0])
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    algo.train()
    algo.train_step(batch(), optimizer)
    algo.eval()
    algo.set_max_subnet()
    with pytest.warns(UserWarning, match="calibrate_batch_norm"):
        algo(batch()[0])


def test_calibration_over_batches_is_exact() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(2))
    algo = make(net=net).double()
    images = batch(dtype=torch.float64)[0] * 3 + 5
    labels = batch()[1]
    fastslim.calibrate_batch_norm(
        algo, [(images[:3], labels[:3]), (images[3:], labels[3:])], [algo.mutator.max_choices]
    )
    algo.set_max_subnet()
    y = net[0](images).transpose(0, 1).flatten(1)
    torch.testing.assert_close(net[1].calibrated[0], y.mean(1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(net[1].calibrated[1], y.var(1), rtol=1e-10, atol=1e-10)


def test_empty_calibration_data_is_refused() -> None:
    algo = make()
    with pytest.raises(errors.FastslimValueError, match="yields no batch"):
        fastslim.calibrate_batch_norm(algo, [], [algo.mutator.max_choices])


@pytest.mark.parametrize("change", ["load", "step", "copy"])
def test_calibration_belongs_to_the_weights_it_was_made_for(change) -> None:
    algo = make()
    choices = algo.mutator.min_choices
    fastslim.calibrate_batch_norm(algo, [batch()], [choices])
    algo.eval()
    if change == "load":
        algo.architecture.load_state_dict(algo.architecture.state_dict())
    elif change == "step":
        F.cross_entropy(algo.architecture(batch()[0]), batch()[1]).backward()
        torch.optim.SGD(algo.parameters(), lr=0.1).step()
    else:
        algo = copy.deepcopy(algo)
    algo.set_subnet(choices)
    if change == "copy":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            algo(batch()[0])
        return
    with pytest.warns(UserWarning, match="calibrate_batch_norm"):
        algo(batch()[0])


def test_calibrating_leaves_the_width_alone_even_when_it_fails() -> None:
    algo = make()
    images, labels = batch()
    algo.set_min_subnet()
    before = algo.mutator.current_choices
    fastslim.calibrate_batch_norm(algo, [(images, labels)], [algo.mutator.max_choices])
    assert algo.mutator.current_choices == before
    with pytest.raises(errors.FastslimValueError, match="NaN"):
        fastslim.calibrate_batch_norm(algo, [(images * float("nan"), labels)], [algo.mutator.max_choices])
    assert algo.mutator.current_choices == before


def test_calibration_of_unusual_norms() -> None:
    class Net(nn.Module):
        """A head for training only, a norm without statistics, a norm used twice."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.shared = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
            self.stateless, self.head = nn.BatchNorm2d(16, track_running_stats=False), nn.BatchNorm2d(16)
            self.fc = nn.Linear(16, 10)

        def forward(self, x):
            x = self.shared(torch.relu(self.shared(self.conv(x))) + 1)
            x = self.stateless(x)
            if self.training:
                x = self.head(x)
            return self.fc(x.mean((2, 3)))

    net = Net().double()
    algo = make(net=net)
    images, labels = batch(dtype=torch.float64)
    fastslim.calibrate_batch_norm(algo, [(images, labels)], [algo.mutator.max_choices])
    y = net.conv(images)
    z = torch.relu(
        (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    )
    both = torch.cat([y, z + 1]).transpose(0, 1).flatten(1)
    algo.set_max_subnet()
    torch.testing.assert_close(net.shared.calibrated[0], both.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(net.shared.calibrated[1], both.var(1), rtol=1e-6, atol=1e-6)
    assert net.head.calibrated is None
    assert net.stateless.calibrated is None


def test_calibration_of_a_switchable_norm_placed_by_hand() -> None:
    # The tracer does not look into it: its unit stays at full width, and its sets for other widths are not reached.
    norm = fastslim.nn.SwitchableBatchNorm2d(16, candidates=[8])
    net = nn.Sequential(nn.Conv2d(3, 16, 1), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    algo = make(net=net, choices=[0.5, 1.0]).double()
    images, labels = batch(dtype=torch.float64)
    fastslim.calibrate_batch_norm(algo, [(images, labels)], [algo.mutator.max_choices])
    algo.eval()
    algo.set_max_subnet()
    torch.testing.assert_close(norm.calibrated[0], net[0](images).detach().mean((0, 2, 3)))
    assert norm.candidate_bn["8"].calibrated is None
