"""The analytic cost of a subnet is what is counted on the exported network while it runs, to the last operation."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from cost_nets import NETS
from counted_run import counted_run
from torch import nn

import fastslim
from fastslim.cost import cost_of
from fastslim.errors import FastslimTypeError, FastslimValueError
from fastslim.models import create_model

MODELS = ["resnet18", "resnet50", "mobilenet_v1", "mobilenet_v2", "mnasnet"]


def supernet(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETS[name]() if name in NETS else create_model(name, num_classes=10)
    fastslim.convert(model.eval(), torch.zeros(1, 3, 32, 32), divisor=4, seed=3)
    return model


@pytest.mark.parametrize("name", [*MODELS, *NETS])
def test_cost_is_what_is_counted_on_the_exported_network(name: str) -> None:
    model = supernet(name)
    mutator = fastslim.mutators.mutator_of(model)
    assert mutator is not None
    images = (torch.randn(1, 3, 32, 32),)
    costs = set()
    for subnet in [mutator.max_choices, mutator.min_choices, *(mutator.sample_choices() for _ in range(3))]:
        cost = cost_of(model, subnet)
        assert asdict(cost) == counted_run(fastslim.export_subnet(model, subnet), images)
        costs.add(tuple(asdict(cost).values()))
    assert len(costs) >= 3


def test_memory_is_of_one_sample() -> None:
    one, four = Shortcut(), Shortcut()
    fastslim.convert(one, torch.zeros(1, 3, 8, 8))
    fastslim.convert(four, torch.zeros(4, 3, 8, 8))
    assert cost_of(one) == cost_of(four)
    assert cost_of(one).peak_activation_bytes == cost_of(four).peak_activation_bytes


class Shortcut(nn.Module):
    """The peak lies inside the branch: its input has to wait for the addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 64, 1), nn.Conv2d(64, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, 16, H, W)."""
        x = self.stem(x)
        return x + self.down(torch.relu_(self.up(x)))


def test_peak_holds_what_a_later_operation_still_reads() -> None:
    model = Shortcut()
    fastslim.convert(model, torch.zeros(1, 3, 8, 8), choices=[0.5, 1.0], divisor=8)
    # At the activation: the shortcut, its input and, as if it were not in place, its output.
    assert cost_of(model).peak_activation_bytes == (16 + 64 + 64) * 64 * 4
    assert cost_of(model, {"up_(0, 64)_64": 32}).peak_activation_bytes == (16 + 32 + 32) * 64 * 4


def test_bytes_follow_the_data_types() -> None:
    model = Shortcut().double()
    fastslim.convert(model, torch.zeros(1, 3, 8, 8))
    single = Shortcut()
    fastslim.convert(single, torch.zeros(1, 3, 8, 8))
    assert cost_of(model).weight_bytes == 2 * cost_of(single).weight_bytes == 8 * cost_of(model).parameters
    assert cost_of(model).peak_activation_bytes == 2 * cost_of(single).peak_activation_bytes


def test_every_source_and_the_present_subnet() -> None:
    model = Shortcut()
    algo = fastslim.AutoSlim(architecture=model, example_inputs=torch.zeros(1, 3, 8, 8), choices=[0.5, 1.0])
    algo.set_min_subnet()
    smallest = algo.mutator.min_choices
    assert cost_of(algo) == cost_of(algo.mutator, smallest) == algo.subnet_cost(smallest) != cost_of(algo, {})
    assert algo.mutator.current_choices == smallest


def test_bad_subnets_are_refused() -> None:
    model = Shortcut()
    fastslim.convert(model, torch.zeros(1, 3, 8, 8), choices=[0.5, 1.0])
    with pytest.raises(FastslimValueError, match=r"no unit is called 'up_\(0, 64\)'; did you mean 'up_\(0, 64\)_64'"):
        cost_of(model, {"up_(0, 64)": 32})
    with pytest.raises(FastslimValueError, match="33 is no choice of unit 'up_"):
        cost_of(model, {"up_(0, 64)_64": 33})
    with pytest.raises(FastslimTypeError, match="a subnet is a dict from unit name to width, got list"):
        cost_of(model, [1, 2])  # type: ignore[arg-type]
    with pytest.raises(FastslimTypeError, match=r"cost_of takes an AutoSlim.*got Linear"):
        cost_of(nn.Linear(2, 2))
