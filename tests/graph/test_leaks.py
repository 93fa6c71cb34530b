"""Sizes that C code takes out of sight: a rewritten forward never keeps the example's number silently."""

import math

import pytest
import torch
from torch import nn

import fastslim

TABLE = [0.5 * i for i in range(64)]


class Scaled(nn.Module):
    """Uses a learned scale, so that its forward is rewritten, and computes a number from a size."""

    def __init__(self, factor, dim):
        super().__init__()
        self.scale, self.factor, self.dim = nn.Parameter(torch.rand(16)), factor, dim

    def forward(self, x):
        return x * self.scale[:, None, None] * self.factor(x.shape[self.dim])


FACTORS = {
    "division of a float": lambda n: 1.0 / n,
    "logarithm": lambda n: math.log(n),
    "table": lambda n: TABLE[n],
    "half": lambda n: 0.5 * n,
    "product": lambda n: math.prod([1.5, n]),
}


def make(factor, dim):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), Scaled(factor, dim), nn.Conv2d(16, 5, 1)).double()


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
def test_other_sizes_are_computed_anew_or_the_module_stays_full(factor, dim):
    model = make(factor, dim)
    report = fastslim.convert(model, torch.randn(2, 3, 8, 8, dtype=torch.float64), choices=[0.25, 1], divisor=1)
    mutator = report.mutator
    mutator.set_min_choices()
    for size in (8, 11):
        x = torch.randn(1, 3, size, size, dtype=torch.float64)
        width = mutator.trace.layers["0"].out_width(mutator.current_choices)
        y = nn.functional.conv2d(x, model[0].weight[:width], model[0].bias[:width])
        y = y * model[1].scale[:width, None, None] * factor(y.shape[dim])
        y = nn.functional.conv2d(y, model[2].weight[:, :width], model[2].bias)
        torch.testing.assert_close(model(x), y)


def test_the_report_says_what_was_taken():
    report = fastslim.convert(make(FACTORS["logarithm"], 2), (2, 3, 8, 8), divisor=1)
    assert "computes with a size out of sight" in str(report) or "computes with a channel count" in str(report)


def test_recorded_arithmetic_is_no_leak():
    model = make(lambda n: (n * 2 + 1) // 3 % 7, 2)
    report = fastslim.convert(model, (2, 3, 8, 8), choices=[0.25, 1], divisor=1)
    assert [unit.is_mutable for unit in report.mutator.units] == [True, False]
    report.mutator.set_min_choices()
    assert model(torch.randn(1, 3, 12, 12, dtype=torch.float64)).shape == (1, 5, 10, 10)
