"""Which channels make up a unit, what stays at full width and why, and what cannot be traced."""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo import ZOO, make

from fastslim.errors import FastslimRuntimeError, FastslimTypeError, FastslimValueError
from fastslim.graph import trace
from fastslim.mutators import OneShotChannelMutator

UNIT = dict(
    type="OneShotMutableChannelUnit",
    default_args=dict(candidate_choices=[0.25, 0.5, 0.75, 1.0], choice_mode="ratio", divisor=4),
)


def leaves(output):
    return torch.utils._pytree.tree_leaves(output)


@pytest.mark.parametrize("name", ZOO)
def test_tracing_leaves_the_model_as_it_was(name):
    model, inputs = make(name)
    model.train()
    before, state, random_state = (
        [dict(m.__dict__) for m in model.modules()],
        copy.deepcopy(model.state_dict()),
        torch.get_rng_state(),
    )
    trace(model, inputs)
    assert all(m.training for m in model.modules())
    assert all(m.__dict__.keys() == b.keys() for m, b in zip(model.modules(), before, strict=True))
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert torch.equal(torch.get_rng_state(), random_state)


def unit_members(found):
    return {frozenset(unit.members) for unit in found.units if unit.mutable}


def test_residual_branches_are_one_unit():
    model, inputs = make("Residual")
    assert unit_members(trace(model, inputs)) == {
        frozenset({"stem.0", "stem.1", "b.0", "b.1"}),
        frozenset({"a.0", "a.1"}),
        frozenset({"c.0", "c.1"}),
        frozenset({"d.0", "d.1"}),
        frozenset({"d2.0", "d2.1", "down.0", "down.1"}),
    }


def test_unit_names_hold_module_range_and_channels():
    model, inputs = make("Residual")
    assert trace(model, inputs).units[0].name == "stem.0_(0, 16)_16"


def test_a_unit_is_counted_in_the_channels_of_its_first_layer():
    model, inputs = make("InvertedResidual")
    found = trace(model, inputs)
    unit = next(unit for unit in found.units if "dw2.0" in unit.members)
    widths = {unit.name: 8}
    assert (found.layers["expand2.0"].out_width(widths), found.layers["dw2.0"].out_width(widths)) == (8, 16)
    assert found.layers["head"].in_width(widths) == 16


def test_concat_gives_segments():
    model, inputs = make("Inception")
    found = trace(model, inputs)
    b1, b2, b3 = (next(u.name for u in found.units if n in u.members) for n in ("b1", "b2", "b3"))
    assert found.layers["mix"].segments({b1: 4, b2: 8, b3: 12}) == ((0, 4), (8, 8), (24, 15))
    assert found.layers["mix"].segments({b1: 8, b2: 16, b3: 12}) is None


def test_grouped_convolution_keeps_whole_groups():
    model, inputs = make("Grouped")
    found = trace(model, inputs)
    unit = next(unit for unit in found.units if "g.0" in unit.members)
    assert unit.granularity == 8 and {"a.0", "g.0"} <= set(unit.members)
    assert found.layers["g2.0"].out_width({next(u.name for u in found.units if "stem.0" in u.members): 8}) == 4


def test_flatten_counts_pixels():
    model, inputs = make("FlattenHead")
    found = trace(model, inputs)
    unit = next(unit.name for unit in found.units if "features.3" in unit.members)
    assert found.layers["classifier.1"].in_width({unit: 5}) == 5 * 49
    assert [unit.mutable for unit in found.units] == [True, True, True, False]


def test_a_layer_called_twice_ties_its_inputs():
    model, inputs = make("TwoHeads")
    unit = next(unit for unit in trace(model, inputs).units if "twice.0" in unit.members)
    assert {"enc.0", "side.0", "lateral", "twice.0"} <= set(unit.members)


class Cut(nn.Module):
    """Two convolutions around an operation."""

    def __init__(self, between, **parts):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.between = between
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.second(self.between(self, self.first(x))).mean((2, 3))


NOT_FOLLOWED = {
    "sorted channels": (lambda s, x: x.sort(1).values, {}, ""),
    "flipped channels": (lambda s, x: x.flip(1), {}, ""),
    "every other channel": (lambda s, x: x[:, ::2].repeat(1, 2, 1, 1), {}, ""),
    "spectrum of channels": (lambda s, x: torch.fft.fft(x, dim=1).real, {}, ""),
    "rolled channels": (lambda s, x: x.roll(1, 1), {}, ""),
    "gathered channels": (lambda s, x: x[:, [7, 6, 5, 4, 3, 2, 1, 0]], {}, ""),
    "number and constant": (lambda s, x: x.view(2, 8, -1).view(2, 8, 16, 16) / int(x.size(1)), {}, "computes with"),
    "unfolded constants": (lambda s, x: s.split(x.flatten(2)).flatten(1, 2).unflatten(2, (16, 16)), {}, "constants"),
}


@pytest.mark.parametrize("case", NOT_FOLLOWED)
def test_what_is_not_followed_stays_full_and_is_reported_with_its_line(case):
    between, parts, reason = NOT_FOLLOWED[case]
    model = Cut(between, split=nn.Unflatten(1, (2, 4)), **parts)
    found = trace(model, (2, 3, 16, 16))
    assert not any("first" in unit.members for unit in found.units if unit.mutable)
    findings = [f for f in found.report.full_width if reason in f.reason and f.subject != "output"]
    assert findings and all("test_trace.py:" in str(finding) for finding in findings), str(found.report)
    mutator = OneShotChannelMutator(UNIT, example_inputs=(2, 3, 16, 16))
    x, plain = torch.randn(2, 3, 16, 16), copy.deepcopy(model)
    mutator.prepare_from_supernet(model)
    mutator.set_min_choices()
    torch.testing.assert_close(model(x), plain(x))


def test_exclude_keeps_outputs_full_and_follows_inputs():
    model, inputs = make("Residual")
    found = trace(model, inputs, exclude=["a.*"])
    assert frozenset({"a.0", "a.1"}) not in unit_members(found)
    assert frozenset({"c.0", "c.1"}) in unit_members(found)
    assert trace(model, inputs, exclude="a").units == found.units


def test_exclude_that_matches_nothing_names_the_nearest_module():
    model, inputs = make("Residual")
    with pytest.raises(FastslimValueError, match="did you mean 'stem'"):
        trace(model, inputs, exclude=["stemm"])


class Steered(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.first(x)
        if x.sum() > 0:
            x = x + 1
        return self.second(x)


def test_a_submodule_that_decides_by_data_stays_full_and_is_reported():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1), Steered(), nn.Conv2d(8, 4, 1))
    plain, x = copy.deepcopy(model), torch.randn(2, 3, 8, 8)
    mutator = OneShotChannelMutator(UNIT, example_inputs=(1, 3, 8, 8))
    mutator.prepare_from_supernet(model)
    found = mutator.trace
    assert list(found.layers) == ["0", "1", "3"]
    assert [unit.mutable for unit in found.units] == [True, False, False]
    assert any(
        f.subject.startswith("2 (Steered)") and "data-dependent" in f.reason and "test_trace.py:" in f.reason
        for f in found.report.full_width
    )
    mutator.set_min_choices()
    plain[0].weight.data, plain[0].bias.data = plain[0].weight[:4].detach(), plain[0].bias[:4].detach()
    plain[1].weight.data = plain[1].weight[:, :4].detach()
    torch.testing.assert_close(model(x), plain(x))


def test_a_model_that_decides_by_data_itself_is_refused():
    with pytest.raises(FastslimRuntimeError, match=r"data-dependent.*test_trace.py:\d+.*submodule of its own"):
        trace(Steered(), (1, 3, 8, 8))


def test_branches_on_spatial_sizes_are_recorded():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            if x.shape[-1] % 4 or len(x) > 1:
                x = F.pad(x, (0, int(x.shape[-1] % 4)))
            return self.out(self.conv(x))

    assert trace(Padded(), (1, 3, 9, 9)).units[0].mutable


def test_a_branch_taken_in_training_only_is_traced_too():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.aux, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = self.conv(x)
            return (self.out(x), self.aux(x)) if self.training else self.out(x)

    found = trace(Auxiliary().eval(), (1, 3, 8, 8))
    assert set(found.layers) == {"conv", "aux", "out"}
    assert found.layers["aux"].out_positions == 0


def test_wrong_example_inputs_say_what_forward_takes():
    model, inputs = make("TwoHeads")
    with pytest.raises(FastslimTypeError, match="missing a required argument: 'depth'"):
        trace(model, inputs[0])
    with pytest.raises(FastslimTypeError, match="must be a tensor"):
        trace(model, "image")
    with pytest.raises(FastslimRuntimeError, match=r"cnn.py:\d+"):
        trace(model, (inputs[0], inputs[0]))


def test_keyword_inputs_and_defaults():
    model, inputs = make("TwoHeads")
    by_name = trace(model, {"depth": inputs[1], "image": inputs[0]})
    assert by_name.units == trace(model, inputs).units


class Pair(NamedTuple):
    one: torch.Tensor
    two: torch.Tensor


@dataclass
class Box:
    one: torch.Tensor
    two: torch.Tensor


@pytest.mark.parametrize("kind", [Pair, Box, lambda one, two: {"one": [one, two]}])
def test_outputs_in_containers_stay_full(kind):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = self.stem(x)
            return kind(self.one(x), two=self.two(x))

    found = trace(Both(), (1, 3, 8, 8))
    assert [unit.mutable for unit in found.units] == [True, False, False]
    assert [finding.subject for finding in found.report.full_width] == ["output"]


def test_a_training_forward_that_fails_on_one_example_is_reported():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            if self.training and len(x) < 2:
                raise ValueError("needs two")
            return self.out(self.conv(x))

    found = trace(Functional(), (1, 3, 1, 1))
    assert found.units[0].mutable
    assert "forward in training mode: not followed: Functional cannot be traced: ValueError: needs two" in str(
        found.report
    )


def test_functional_batch_norm_is_traced_with_one_example():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("var", torch.ones(4))

        def forward(self, x):
            return F.batch_norm(self.out(self.conv(x)), self.mean, self.var, training=self.training)

    found = trace(Functional(), (1, 3, 1, 1))
    assert found.units[0].mutable and [f.subject for f in found.findings] == ["output"]
