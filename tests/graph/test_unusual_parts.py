"""Unusual things between two layers: equal to the narrow network with the same thing in it, or refused."""

import copy

import pytest
import torch
from torch import nn
from zoo.architecture import Architecture, image, randomise
from zoo.between import UNUSUAL, conv_net
from zoo.check import RATIOS, assert_same, assert_untouched, call, narrow_copy, snapshot

import fastslim
from fastslim import ops
from fastslim.errors import FastslimError

# What Python does with a tensor's values, and what torch.func does inside, cannot be followed.
REFUSED = {"branch", "number", "loop", "numpy", "vmap"}
# Norms of weights follow the data of earlier passes, or have statistics of their own.
OWN_STATE = ("spectral norm",)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_parts_are_right_at_every_width_or_refused(case):
    """Also with other batches and other data, at which a branch goes the other way."""
    torch.manual_seed(0)
    middle, parts = UNUSUAL[case]

    def build(a=16, between=16, b=16):
        return conv_net(middle, a, between, b, **parts)

    size = 16 if case == "transposed" else 8
    architecture = Architecture(
        build, image(3, size, size), {"a": "a.weight:0", "between": "b.weight:1", "b": "b.weight:0"}
    )
    model = build()
    randomise(model)
    model.double()
    plain = build().double()
    plain.load_state_dict(model.state_dict())
    inputs, before = architecture.inputs(2), snapshot(model)
    try:
        mutator = fastslim.convert(model, inputs, choices=RATIOS, divisor=1, seed=0).mutator
    except FastslimError:
        assert case in REFUSED
        assert_untouched(model, before)
        return
    assert case not in REFUSED and mutator.mutable_units
    batches = [inputs, (architecture.inputs(3)[0] - 1,), (architecture.inputs(1)[0] + 1,)]
    for training in (False, True):
        for batch in batches:
            with ops.use_backend("reference"):
                ours, theirs = (call(net.train(training), batch) for net in (model, plain))
            assert torch.equal(ours[0], theirs[0])
    if case in OWN_STATE:
        return
    model.load_state_dict(plain.state_dict())
    for choices in (mutator.min_choices, mutator.sample_choices(), mutator.sample_choices(), mutator.max_choices):
        mutator.set_choices(choices)
        narrow, where = narrow_copy(architecture, plain, mutator, choices)
        for batch in batches:
            assert_same(model, narrow, where, batch)
            narrow, where = narrow_copy(architecture, plain, mutator, choices)


class Steered(nn.Module):
    """Decides by data, in a module of its own."""

    def __init__(self, one, other):
        super().__init__()
        self.one, self.other = nn.Conv2d(16, one, 1), nn.Conv2d(16, other, 1)

    def forward(self, x):
        return self.one(x) if x.mean() > 0 else self.other(x)


def test_a_submodule_that_decides_by_data_stays_and_the_others_do_not():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1), Steered(16, 16), nn.Conv2d(16, 4, 1), nn.Flatten())
    plain, x = copy.deepcopy(model), torch.randn(2, 3, 4, 4)
    report = fastslim.convert(model, x, choices=RATIOS, divisor=1)
    assert [unit.spec.members for unit in report.mutator.mutable_units] == [("0",)]
    assert any("data-dependent" in finding.reason for finding in report.full_width)
    assert torch.equal(model(x), plain(x))
    report.mutator.set_min_choices()
    for sign in (1, -1):
        x = torch.full((1, 3, 4, 4), 100.0 * sign)
        narrow = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 16, 1), *plain[2:])
        with torch.no_grad():
            for own, full in zip(narrow[0].parameters(), plain[0].parameters(), strict=True):
                own.copy_(full[:1])
            narrow[1].weight.copy_(plain[1].weight[:, :1])
            narrow[1].bias.copy_(plain[1].bias)
        torch.testing.assert_close(model(x), narrow(x))
