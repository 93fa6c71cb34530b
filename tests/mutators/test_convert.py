"""`fastslim.convert`: in place, carried along by copies and files, and taken by AutoSlim."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import fastslim
from fastslim.errors import FastslimError, FastslimRuntimeError, FastslimTypeError, FastslimValueError
from fastslim.graph import Report
from fastslim.mutators import OneShotChannelMutator, mutator_of

SHAPE = (2, 3, 8, 8)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16))
        self.a, self.b = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.b(torch.relu(self.a(torch.relu(self.stem(x))))).mean((2, 3)))


def test_the_model_is_converted_in_place_and_unchanged_at_full_width():
    model = Small().eval()
    keys, x = list(model.state_dict()), torch.randn(SHAPE)
    weight, before = model.a.weight, model(x)
    report = fastslim.convert(model, SHAPE)
    assert isinstance(report, Report) and report.model is model and report.mutator is mutator_of(model)
    assert type(model) is Small and model.a.weight is weight and list(model.state_dict()) == keys
    assert torch.equal(model(x), before)
    report.mutator.set_min_choices()
    assert (model.a.active_out, model.stem[0].active_out) == (8, 8)
    assert not torch.equal(model(x), before)


def test_choices_divisor_include_exclude_and_seed_reach_the_units():
    report = fastslim.convert(Small(), SHAPE, choices=[0.25, 1.0], divisor=4, exclude=["a"])
    assert [list(unit.candidate_widths) for unit in report.mutator.units] == [[4, 16], [32], [4], [5]]
    assert "a: excluded by the caller" in str(report)
    report = fastslim.convert(Small(), SHAPE, divisor=1, choices=[i / 8 for i in range(1, 9)], include="a")
    assert [len(unit.candidate_widths) for unit in report.mutator.units] == [1, 8, 1, 1]
    draws = [fastslim.convert(Small(), SHAPE, divisor=1, seed=5).mutator.sample_choices() for _ in range(2)]
    assert draws[0] == draws[1]


def test_units_too_small_for_the_divisor_are_reported():
    report = fastslim.convert(Small(), SHAPE)
    small = next(row for row in report.layers if row.name == "b")
    assert not small.slims_out and "4 channels, and the choices leave no other width (divisor 8)" in small.reason


def test_report_says_what_the_plan_fuses():
    assert fastslim.convert(Small(), SHAPE).plan == ("batch norm fused with 1 activations and 0 residual adds",)


@pytest.mark.parametrize("through", ["deepcopy", "torch.save"])
def test_a_copy_brings_its_own_mutator(through):
    model = Small().eval()
    report = fastslim.convert(model, SHAPE, divisor=4)
    report.mutator.set_choices({unit.name: unit.candidate_widths[1] for unit in report.mutator.mutable_units})
    if through == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    mutator, x = mutator_of(twin), torch.randn(SHAPE)
    assert mutator is not report.mutator and mutator.trace.model is twin
    assert mutator.current_choices == report.mutator.current_choices
    assert torch.equal(twin(x), model(x))
    mutator.set_min_choices()
    assert twin.a.active_out < model.a.active_out
    mutator.units[1].current_choice = 1.0
    assert twin.a.active_out == 32


def test_autoslim_takes_a_converted_network():
    x, labels = torch.randn(SHAPE), torch.tensor([0, 1])
    losses = []
    for form in ("plain", "converted", "mutator", "copy"):
        torch.manual_seed(0)
        model = Small()
        if form == "plain":
            algo = fastslim.AutoSlim(architecture=model, example_inputs=x, choices=[0.5, 1.0], divisor=4, seed=1)
        else:
            mutator = fastslim.convert(model, SHAPE, choices=[0.5, 1.0], divisor=4, seed=1).mutator
            model = copy.deepcopy(model) if form == "copy" else model
            algo = fastslim.AutoSlim(mutator if form == "mutator" else None, architecture=model)
            assert algo.mutator is mutator_of(model)
        step = algo.train().train_step((x, labels), torch.optim.SGD(algo.parameters(), 0.1))
        losses.append([float(value) for value in step.values()])
    assert losses[0] == losses[1] == losses[2] == losses[3]
    twin = copy.deepcopy(algo)
    assert twin.mutator is mutator_of(twin.architecture) and twin.mutator is not algo.mutator


def test_a_converted_network_compiles_and_follows_its_widths():
    model = Small().eval()
    mutator, x = fastslim.convert(model, SHAPE).mutator, torch.randn(SHAPE)
    compiled = torch.compile(model, backend="eager")
    for choices in (mutator.max_choices, mutator.min_choices):
        mutator.set_choices(choices)
        torch.testing.assert_close(compiled(x), model(x))


def test_autoslim_takes_a_mutator_prepared_by_hand():
    model = Small()
    mutator = OneShotChannelMutator(example_inputs=SHAPE)
    mutator.prepare_from_supernet(model)
    assert fastslim.AutoSlim(mutator, architecture=model).mutator is mutator
    with pytest.raises(FastslimRuntimeError, match="already prepared"):
        fastslim.AutoSlim(mutator, architecture=Small())


@pytest.mark.parametrize("argument", [{"choices": [0.5, 1.0]}, {"divisor": 4}, {"exclude": ["a"]}, {"seed": 1}])
def test_autoslim_refuses_choices_for_a_converted_network(argument):
    model = Small()
    fastslim.convert(model, SHAPE)
    with pytest.raises(FastslimValueError, match=r"to fastslim\.convert"):
        fastslim.AutoSlim(architecture=model, **argument)


def test_another_mutator_is_refused_for_a_converted_network():
    model = Small()
    fastslim.convert(model, SHAPE)
    with pytest.raises(FastslimRuntimeError, match="by another mutator"):
        fastslim.AutoSlim(OneShotChannelMutator(example_inputs=SHAPE), architecture=model)
    with pytest.raises(FastslimRuntimeError, match="converted already"):
        fastslim.convert(model, SHAPE)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (dict(example_inputs=(2, 4, 8, 8)), FastslimRuntimeError),
        (dict(example_inputs={"y": torch.zeros(SHAPE)}), FastslimTypeError),
        (dict(example_inputs=SHAPE, choices=[]), FastslimValueError),
        (dict(example_inputs=SHAPE, choices=[2.0]), FastslimValueError),
        (dict(example_inputs=SHAPE, divisor=0), FastslimValueError),
        (dict(example_inputs=SHAPE, include=["c"]), FastslimValueError),
        (dict(example_inputs=SHAPE, random_widths="all"), FastslimValueError),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(arguments, error):
    model = Small()
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(error):
        fastslim.convert(model, **arguments)
    assert [dict(vars(module)) for module in model.modules()] == before
    assert [type(module) for module in model.children()] == [nn.Sequential, nn.Conv2d, nn.Conv2d, nn.Linear]
    assert mutator_of(model) is None


def test_only_modules_are_converted():
    with pytest.raises(FastslimError, match=r"must be a torch\.nn\.Module, but got function"):
        fastslim.convert(lambda x: x, SHAPE)
