"""Choosing widths: sampling, setting, configs, and messages for what cannot be."""

import copy
import json
from collections import Counter

import pytest
import torch
from torch import nn

from fastslim.errors import FastslimRuntimeError, FastslimTypeError, FastslimValueError
from fastslim.mutators import (
    ChannelMutator,
    OneShotChannelMutator,
    OneShotMutableChannelUnit,
    RatioPruner,
)
from fastslim.nn import SlimConv2d, SlimLinear
from fastslim.registry import MODELS

SHAPE = (1, 3, 8, 8)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 48, 3, padding=1),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.Conv2d(48, 96, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(96, 4, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def prepared(cls=OneShotChannelMutator, model=None, **kwargs):
    mutator = cls(example_inputs=SHAPE, **kwargs)
    mutator.prepare_from_supernet(network() if model is None else model)
    return mutator


FIRST, SECOND = "0_(0, 48)_48", "3_(0, 96)_96"


def test_defaults_are_twelfths_rounded_to_eight():
    mutator = prepared()
    assert [unit.name for unit in mutator.mutable_units] == [FIRST, SECOND]
    assert mutator.mutable_units[0].candidate_widths == (8, 16, 24, 32, 40, 48)
    assert mutator.mutable_units[1].candidate_widths == tuple(range(16, 97, 8))
    assert mutator.max_choices == {FIRST: 48, SECOND: 96}
    assert mutator.min_choices == {FIRST: 8, SECOND: 16}


def test_weights_are_kept_and_shared():
    model = network()
    weights, x = dict(model.named_parameters()), torch.randn(2, 3, 8, 8)
    before = model(x)
    prepared(model=model)
    assert isinstance(model[0], SlimConv2d) and isinstance(model[-1], SlimLinear)
    assert all(weights[name] is p for name, p in model.named_parameters()) and len(weights) == 10
    torch.testing.assert_close(model(x), before)


def test_a_layer_held_twice_is_replaced_twice():
    model = network()
    model.add_module("alias", nn.Sequential())
    model.alias.add_module("again", model[0])
    model.alias.forward = lambda x: x
    prepared(model=model)
    assert model.alias.again is model[0] and isinstance(model[0], SlimConv2d)


def test_set_choices_sets_every_layer():
    model = network()
    mutator = prepared(model=model)
    mutator.set_choices({FIRST: 16, SECOND: 0.5})
    assert mutator.current_choices == mutator.choice_template == {FIRST: 16, SECOND: 48}
    assert model[:1](torch.randn(SHAPE)).shape[1] == 16
    assert model[:4](torch.randn(SHAPE)).shape[1] == 48
    mutator.units[0].current_choice = 8 / 48
    assert model[:1](torch.randn(SHAPE)).shape[1] == 8


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({FIRST: 16, "3_(0, 96)_9": 96}, FastslimValueError, r"did you mean '3_\(0, 96\)_96'"),
        ({FIRST: 15, SECOND: 96}, FastslimValueError, r"15 is no choice of unit .*\[8, 16, 24, 32, 40, 48\]"),
        ({FIRST: 96, SECOND: 96}, FastslimValueError, "96 is no choice of unit"),
        ({FIRST: 1.5, SECOND: 96}, FastslimValueError, "1.5 is no choice"),
        ({FIRST: "16", SECOND: 96}, FastslimTypeError, "must be a number, got '16'"),
        ({FIRST: True, SECOND: 96}, FastslimTypeError, "must be a number, got True"),
        ([16, 96], FastslimTypeError, "must be a dict"),
    ],
)
def test_bad_choices_change_nothing(choices, error, message):
    mutator = prepared()
    mutator.set_choices({FIRST: 24, SECOND: 48})
    with pytest.raises(error, match=message):
        mutator.set_choices(choices)
    assert mutator.current_choices == {FIRST: 24, SECOND: 48}


def test_units_left_out_keep_their_width():
    mutator = prepared()
    mutator.set_choices({FIRST: 24, SECOND: 48})
    mutator.set_choices({FIRST: 16})
    assert mutator.current_choices == {FIRST: 16, SECOND: 48}
    with pytest.raises(FastslimValueError, match="of another supernet: it lacks unit"):
        mutator.load_state_dict({**mutator.state_dict(), "choices": {FIRST: 16}})


def test_sampling_is_even_and_repeats_with_the_seed():
    one, other = prepared(seed=7), prepared(seed=7)
    samples = [one.sample_choices() for _ in range(600)]
    assert samples == [other.sample_choices() for _ in range(600)]
    counts = Counter(sample[FIRST] for sample in samples)
    assert set(counts) == {8, 16, 24, 32, 40, 48} and min(counts.values()) > 60


def test_sampling_goes_on_after_a_saved_state():
    mutator = prepared(seed=1)
    mutator.set_choices(mutator.sample_choices())
    state = json.loads(json.dumps(mutator.state_dict()))
    expected = [mutator.sample_choices() for _ in range(5)]
    resumed = prepared(seed=2)
    resumed.load_state_dict(state)
    assert resumed.current_choices == mutator.current_choices
    assert [resumed.sample_choices() for _ in range(5)] == expected
    with pytest.raises(FastslimValueError, match="random_state"):
        resumed.load_state_dict({"choices": {}})


def test_uniform_widths_draw_one_ratio():
    mutator = prepared(random_widths="uniform", seed=0)
    for _ in range(30):
        sample = mutator.sample_choices()
        assert abs(sample[FIRST] / 48 - sample[SECOND] / 96) <= 4 / 48 + 1e-9
    assert mutator.uniform_choices(0.5) == {FIRST: 24, SECOND: 48}
    assert mutator.uniform_choices(0.01) == mutator.min_choices
    with pytest.raises(FastslimValueError, match="ratio must lie"):
        mutator.uniform_choices(1.2)


def test_kinds_of_samples():
    mutator = prepared()
    assert mutator.sample_choices("max") == mutator.max_choices
    assert mutator.sample_choices("min") == mutator.min_choices
    with pytest.raises(FastslimValueError, match="'random', 'max' or 'min'"):
        mutator.sample_choices("median")


def test_search_groups_hold_one_mutable_unit_each():
    mutator = prepared()
    assert {i: [u.name for u in group] for i, group in mutator.search_groups.items()} == {0: [FIRST], 1: [SECOND]}


def test_fixing_leaves_one_choice():
    mutator = prepared()
    mutator.set_choices({FIRST: 24, SECOND: 48})
    mutator.fix_channel_mutables()
    assert mutator.mutable_units == [] and mutator.sample_choices() == {}
    mutator.set_max_choices()
    assert mutator.units[0].width == 24


def test_config_can_be_fed_back():
    mutator = prepared()
    mutator.set_choices({FIRST: 24, SECOND: 40})
    config = mutator.config_template(with_unit_init_cfg=True, with_channels=True)
    unit = config["channel_unit_cfg"]["units"][FIRST]
    assert unit["choice"] == 0.5 and unit["init_args"]["divisor"] == 8
    for unit in config["channel_unit_cfg"]["units"].values():
        unit.pop("channels")
    again = MODELS.build(dict(json.loads(json.dumps(config)), example_inputs=SHAPE))
    again.prepare_from_supernet(network())
    assert again.current_choices == mutator.current_choices
    assert [u.candidate_widths for u in again.units] == [u.candidate_widths for u in mutator.units]
    small = mutator.config_template(only_mutable_units=True)["channel_unit_cfg"]["units"]
    assert set(small) == {FIRST, SECOND} and small[FIRST] == {"choice": 0.5}


def test_seed_config_of_mmrazor_works():
    mutator = MODELS.build(
        dict(
            type="OneShotChannelMutator",
            channel_unit_cfg=dict(
                type="OneShotMutableChannelUnit",
                default_args=dict(candidate_choices=[i / 12 for i in range(2, 13)], candidate_mode="ratio", divisor=8),
            ),
            parse_cfg=dict(type="ChannelAnalyzer", demo_input=SHAPE, tracer_type="BackwardTracer"),
        )
    )
    mutator.prepare_from_supernet(network())
    assert mutator.min_choices == {FIRST: 8, SECOND: 16}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(channel_unit_cfg=dict(type="OneShotMutableChannelUnits")), "did you mean 'OneShotMutableChannelUnit'"),
        (dict(channel_unit_cfg=dict(type="OneShotMutableChannelUnit", defaults={})), "did you mean 'default_args'"),
        (dict(channel_unit_cfg=dict(default_args={})), "needs a type"),
        (dict(parse_cfg=dict(demo_inputs=SHAPE)), "did you mean 'demo_input'"),
        (dict(parse_cfg=dict(type="Analyzer")), "use 'ChannelAnalyzer'"),
        (dict(random_widths="global"), "'per_unit' or 'uniform'"),
    ],
)
def test_bad_configs_name_the_fix(arguments, message):
    with pytest.raises(FastslimValueError, match=message):
        OneShotChannelMutator(**arguments)


def test_bad_unit_configs_leave_the_model_as_it_was():
    model = network()
    mutator = OneShotChannelMutator(
        dict(type=OneShotMutableChannelUnit, units={"0_(0, 48)_49": dict(choice=8)}), example_inputs=SHAPE
    )
    with pytest.raises(FastslimValueError, match="is no unit of this model; did you mean"):
        mutator.prepare_from_supernet(model)
    with pytest.raises(FastslimTypeError, match="cannot be made from"):
        prepared(model=model, channel_unit_cfg=dict(type=OneShotMutableChannelUnit, default_args=dict(ratios=[1])))
    assert type(model[0]) is nn.Conv2d


def test_before_preparing_the_error_says_what_to_call():
    mutator = OneShotChannelMutator()
    for use in (
        lambda: mutator.units,
        lambda: mutator.search_groups,
        lambda: mutator.sample_choices(),
        lambda: mutator.set_choices({}),
        lambda: mutator.trace,
        lambda: mutator.config_template(),
    ):
        with pytest.raises(FastslimRuntimeError, match="call prepare_from_supernet"):
            use()


def test_preparing_twice_is_refused():
    mutator = prepared()
    with pytest.raises(FastslimRuntimeError, match="already prepared"):
        mutator.prepare_from_supernet(network())


def test_a_copy_sets_its_own_layers():
    model = network()
    both = {"model": model, "mutator": prepared(model=model)}
    other = copy.deepcopy(both)
    other["mutator"].set_min_choices()
    other["mutator"].units[0].current_choice = 0.5
    assert (model[0].active_out, other["model"][0].active_out) == (48, 24)


def test_sequential_units_take_every_multiple():
    mutator = prepared(
        ChannelMutator,
        channel_unit_cfg=dict(type="SequentialMutableChannelUnit", default_args=dict(divisor=16, min_value=32)),
    )
    assert mutator.units[0].candidate_widths == (32, 48)
    assert len(prepared(ChannelMutator).units[1].candidate_widths) == 96


def test_ratio_pruner_takes_ratios_and_leaves_named_layers():
    mutator = MODELS.build(
        dict(type="RatioPruner", ratios=(2 / 12, 5 / 12, 1.0), except_start_keys=["head.fc", "3"], example_inputs=SHAPE)
    )
    mutator.prepare_from_supernet(network())
    assert isinstance(mutator, RatioPruner)
    assert {u.name: u.candidate_widths for u in mutator.mutable_units} == {FIRST: (8, 20, 48), "5_(0, 4)_4": (1, 2, 4)}


def test_the_analyzer_lists_units_with_their_layers():
    model = network()
    analyzer = MODELS.build(dict(type="ChannelAnalyzer", demo_input=dict(type="DefaultDemoInput", input_shape=SHAPE)))
    units = analyzer.analyze(model)
    assert units[FIRST] == dict(
        init_args=dict(num_channels=48),
        channels=dict(
            input_related=[entry("1", 48, False), entry("3", 48, False)],
            output_related=[entry("0", 48, True), entry("1", 48, True)],
        ),
    )
    assert list(units) == [FIRST, SECOND, "5_(0, 4)_4"]
    assert units["5_(0, 4)_4"]["channels"]["input_related"] == [entry("8", 256, False)]
    assert type(model[0]) is nn.Conv2d


def entry(name, channels, is_output):
    return dict(name=name, start=0, end=channels, is_output_channel=is_output)
