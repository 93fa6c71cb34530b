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


def test_depthwise_multiplier_counts_a_unit_in_its_larger_channels():
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


class Around(nn.Module):
    """Two convolutions around an operation."""

    def __init__(self, between, **modules):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.between = between
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.second(self.between(self, self.first(x))).mean((2, 3))


NOT_FOLLOWED = {
    "layer norm": (lambda s, x: s.norm(x), dict(norm=nn.LayerNorm(16)), "is not understood"),
    "learned parameter": (lambda s, x: x * s.scale, dict(scale=nn.Parameter(torch.ones(8, 1, 1))), "full-width"),
    "constant view": (lambda s, x: x.view(2, 8, -1).view(2, 8, 16, 16), {}, "constant"),
    "batch view": (lambda s, x: x.view(-1, 8 * 256).view(2, 8, 16, 16), {}, "constant"),
    "channel shuffle": (lambda s, x: x.view(2, 2, -1, 16, 16).transpose(1, 2).reshape(2, -1, 16, 16), {}, "rearr"),
    "channel slice": (lambda s, x: torch.cat([x[:, :4], x[:, 4:]], 1), {}, "some of the channels"),
    "matrix product": (lambda s, x: (x.flatten(2) @ x.flatten(2).transpose(1, 2)).mean() + x, {}, "not understood"),
    "python number": (lambda s, x: x / int(x.size(1)), {}, "steers Python code"),
    "branch on channels": (lambda s, x: x + 1 if x.shape[1] == 8 else x, {}, "channel count"),
    "functional conv": (lambda s, x: F.conv2d(x, s.first.weight.mean(1, keepdim=True), groups=8, padding=1), {}, ""),
}


@pytest.mark.parametrize("case", NOT_FOLLOWED)
def test_what_is_not_followed_stays_full_and_is_reported_with_its_line(case):
    between, modules, reason = NOT_FOLLOWED[case]
    model = Around(between, **modules)
    found = trace(model, (2, 3, 16, 16))
    assert not any("first" in unit.members for unit in found.units if unit.mutable)
    findings = [f for f in found.report.full_width if reason in f.reason and f.subject != "output"]
    assert findings and all("test_trace.py:" in finding.location for finding in findings), str(found.report)
    mutator = OneShotChannelMutator(UNIT, example_inputs=(2, 3, 16, 16))
    x, plain = torch.randn(2, 3, 16, 16), copy.deepcopy(model)
    mutator.prepare_from_supernet(model)
    mutator.set_min_choices()
    torch.testing.assert_close(model(x), plain(x))


def test_a_convolution_with_its_own_forward_stays():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean(), self.bias)

    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), Standardised(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(512, 4)
    )
    found = trace(model, (1, 3, 8, 8))
    assert list(found.layers) == ["0", "2", "4"]
    assert [unit.mutable for unit in found.units] == [False, True, False]
    assert any("subclass of Conv2d" in str(finding) for finding in found.report.full_width)


def test_parametrized_and_shared_weights_stay():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(512, 4)
    )
    nn.utils.parametrizations.weight_norm(model[0])
    model[2].weight = model[1].weight
    findings = [str(finding) for finding in trace(model, (1, 3, 8, 8)).findings]
    for start in (
        "0 (ParametrizedConv2d): has parametrizations",
        "1 (Conv2d): shares its parameters",
        "2 (Conv2d): shares its parameters",
    ):
        assert any(finding.startswith(start) for finding in findings), findings


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


def test_data_dependent_control_flow_names_module_line_and_fix():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Steered())
    with pytest.raises(FastslimRuntimeError, match=r"data-dependent.*test_trace.py:\d+.*exclude=\('1',\)"):
        trace(model, (1, 3, 8, 8))
    found = trace(model, (1, 3, 8, 8), exclude=("1",))
    assert list(found.layers) == ["0"] and not found.units[0].mutable


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
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("var", torch.ones(4))

        def forward(self, x):
            return F.batch_norm(self.out(self.conv(x)), self.mean, self.var, training=self.training)

    found = trace(Functional(), (1, 3, 1, 1))
    assert found.units[0].mutable
    assert "forward in training mode: Functional cannot be traced: Expected more than 1 value" in str(found.report)
