"""What a mutator can be told about its units: classes, dicts, files, with and without a trace."""

import copy
import json

import pytest
import torch
import yaml
from torch import nn
from unit_cases import FIRST, SECOND, SHAPE, THIRD, Net, randomise_statistics

from fastslim.errors import FastslimFileError, FastslimRuntimeError, FastslimTypeError, FastslimValueError
from fastslim.models import mobilenet_v2, resnet18
from fastslim.mutators import (
    ChannelAnalyzer,
    ChannelMutator,
    OneShotChannelMutator,
    OneShotMutableChannelUnit,
    SequentialMutableChannelUnit,
    SlimmableChannelMutator,
)
from fastslim.registry import MODELS

MUTATORS = [ChannelMutator, OneShotChannelMutator, SlimmableChannelMutator]
PARSE = dict(type="ChannelAnalyzer", demo_input=SHAPE)
UNTRACEABLE = dict(type="Config", demo_input=(1, 5, 8, 8))
HALVES = dict(type="OneShotMutableChannelUnit", default_args=dict(candidate_choices=[0.5, 1.0]))


class MyUnit(OneShotMutableChannelUnit):
    """A user's own."""


def prepared(config=None, parse_cfg=PARSE, kind=OneShotChannelMutator, model=None, **kwargs):
    mutator = kind(config, parse_cfg, **kwargs)
    mutator.prepare_from_supernet(Net() if model is None else model)
    return mutator


@pytest.mark.parametrize("kind", MUTATORS)
@pytest.mark.parametrize("model", [resnet18, mobilenet_v2])
def test_mutators_work_with_their_own_defaults(kind, model):
    network, mutator = model(num_classes=4), kind()
    mutator.prepare_from_supernet(network)
    assert len(mutator.mutable_units) > 3 and mutator.name2unit[mutator.units[0].name] is mutator.units[0]
    mutator.set_choices(mutator.sample_choices())
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 4)
    assert list(mutator.search_groups) == list(range(len(mutator.mutable_units)))


@pytest.mark.parametrize("with_channels", [True, False])
@pytest.mark.parametrize("only_mutable", [True, False])
@pytest.mark.parametrize("kind", MUTATORS)
def test_a_template_makes_the_same_mutator_again(kind, only_mutable, with_channels):
    config = dict(HALVES) if kind is OneShotChannelMutator else None
    one = prepared(config, kind=kind)
    one.set_choices(one.sample_choices())
    template = json.loads(json.dumps(one.config_template(only_mutable, True, with_channels)))
    assert template["type"] == kind.__name__
    other = MODELS.build(copy.deepcopy(template))
    other.prepare_from_supernet(Net())
    assert other.current_choices == one.current_choices
    assert [unit.candidate_choices for unit in other.units] == [unit.candidate_choices for unit in one.units]
    assert json.loads(json.dumps(other.config_template(only_mutable, True, with_channels))) == template
    assert one.config_template(with_unit_init_args=True) == one.config_template(with_unit_init_cfg=True)


@pytest.mark.parametrize(
    "config",
    [
        MyUnit,
        dict(type=MyUnit),
        "OneShotMutableChannelUnit",
        "fastslim.OneShotMutableChannelUnit",
        "mmrazor.OneShotMutableChannelUnit",
        dict(HALVES, units={}),
    ],
)
def test_units_are_classes_names_or_dicts(config):
    assert [unit.candidate_widths for unit in prepared(config).mutable_units] == [(4, 8), (6, 12), (3, 6)]


@pytest.mark.parametrize("ending", ["json", "yaml", "yml"])
@pytest.mark.parametrize("form", ["whole", "unit_cfg", "units", "inside"])
def test_units_are_read_from_files(tmp_path, ending, form):
    one = prepared(HALVES)
    one.set_choices({FIRST: 4, THIRD: 3})
    template = json.loads(json.dumps(one.config_template(with_unit_init_cfg=True)))
    content = {"whole": template, "unit_cfg": template["channel_unit_cfg"]}
    file = tmp_path / f"units.{ending}"
    dump = json.dumps if ending == "json" else yaml.safe_dump
    file.write_text(dump(content.get(form, template["channel_unit_cfg"]["units"])))
    config = dict(type="OneShotMutableChannelUnit", units=str(file)) if form == "inside" else file
    other = prepared(config, parse_cfg=None if form == "whole" else PARSE)
    assert other.current_choices == {FIRST: 4, SECOND: 12, THIRD: 3}


def test_slimmable_units_of_a_file_are_subnets(tmp_path):
    widths = {FIRST: [2, 2, 8], SECOND: [6, 12, 12], THIRD: [3, 4, 6], "fc_(0, 5)_5": [5, 5, 5]}
    units = {
        name: dict(
            init_args=dict(num_channels=max(w), candidate_choices=w, choice_mode="number", divisor=1), choice=max(w)
        )
        for name, w in widths.items()
    }
    file = tmp_path / "slimmable.json"
    file.write_text(json.dumps(units))
    model = Net()
    config = dict(type="SlimmableChannelUnit", units=str(file))
    mutator = prepared(config, kind=SlimmableChannelMutator, model=model)
    assert mutator.subnets == [{name: widths[name][i] for name in (FIRST, SECOND, THIRD)} for i in range(3)]
    for subnet in mutator.subnets:
        mutator.set_choices(subnet)
        model(torch.randn(2, *SHAPE[1:]))
    assert set(model.bn.candidate_bn) == {"2"} and set(model.joined.candidate_bn) == {"9", "16"}


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("none.json", None, FastslimFileError, "cannot be read: No such file"),
        ("bad.json", "{", FastslimFileError, "is no JSON"),
        ("bad.yaml", "a: [", FastslimFileError, "is no YAML"),
        ("tag.yaml", "!!python/object/apply:os.getcwd []", FastslimFileError, "is no YAML"),
        ("number.json", "3", FastslimTypeError, "must be a dict, a class of units or its name"),
        ("wrong.json", '{"a": 3}', FastslimTypeError, "the config of unit 'a' must be a dict, got int"),
        ("key.json", '{"a": {"choices": 3}}', FastslimValueError, "no key 'choices'; did you mean 'choice'"),
    ],
)
def test_files_that_hold_no_units_are_refused(tmp_path, name, text, error, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        OneShotChannelMutator(str(tmp_path / name))


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (3, FastslimTypeError, "must be a dict, a class of units or its name, or the path of a file, got int"),
        (nn.Conv2d, FastslimValueError, "no channel unit is called"),
        (dict(type="OneShotMutableChannelUnit", unit={}), FastslimValueError, "did you mean 'units'"),
        (dict(type="OneShotMutableChannelUnit", default_args=[1]), FastslimTypeError, "default_args must be a dict"),
    ],
)
def test_what_is_no_unit_config_is_refused(config, error, message):
    with pytest.raises(error, match=message):
        OneShotChannelMutator(config)


@pytest.mark.parametrize(
    ("parse_cfg", "error", "message"),
    [
        (dict(type="ChannelAnalyser"), FastslimValueError, "did you mean 'ChannelAnalyzer'"),
        (dict(type="Predefine"), FastslimValueError, "did you mean 'Predefined'"),
        (dict(type="Config", tracer="x"), FastslimValueError, "did you mean 'tracer_type'"),
        ("ChannelAnalyzer", FastslimTypeError, "must be a dict or a ChannelAnalyzer, got str"),
    ],
)
def test_what_is_no_parse_cfg_is_refused(parse_cfg, error, message):
    with pytest.raises(error, match=message):
        ChannelMutator(parse_cfg=parse_cfg)


@pytest.mark.parametrize(
    "parse_cfg",
    [
        ChannelAnalyzer(SHAPE),
        ChannelAnalyzer(torch.randn(SHAPE), "FxTracer"),
        dict(PARSE, _scope_="mmrazor", tracer_type="FxTracer"),
        dict(type="BackwardTracer", loss_calculator=dict(type="ImageClassifierPseudoLoss"), demo_input=SHAPE),
    ],
)
def test_all_ways_to_say_how_units_are_found(parse_cfg):
    mutator = prepared(HALVES, parse_cfg)
    assert [unit.name for unit in mutator.mutable_units] == [FIRST, SECOND, THIRD]
    assert prepared(HALVES, json.loads(json.dumps(mutator.config_template()))["parse_cfg"]).units


@pytest.mark.parametrize("parse_cfg", [dict(type="Config", demo_input=SHAPE), UNTRACEABLE, dict(PARSE, from_cfg=True)])
def test_with_config_only_listed_units_change(parse_cfg):
    template = prepared(HALVES).config_template(True, True, True)["channel_unit_cfg"]
    del template["units"][SECOND]
    model, reference = randomise_statistics(Net()), randomise_statistics(Net())
    mutator = prepared(template, parse_cfg, model=model)
    assert [unit.name for unit in mutator.mutable_units] == [FIRST, THIRD]
    full = prepared(HALVES, model=reference)
    x = torch.randn(2, *SHAPE[1:])
    for choices in ({FIRST: 4, THIRD: 6}, {FIRST: 4, THIRD: 3}, {FIRST: 8, THIRD: 3}):
        mutator.set_choices(choices)
        full.set_choices({**choices, SECOND: 12})
        torch.testing.assert_close(model(x), reference(x))
    assert mutator.is_traced == (parse_cfg is not UNTRACEABLE)


def test_a_config_keeps_its_choices_without_a_trace():
    one = prepared(HALVES)
    one.set_choices({FIRST: 4, THIRD: 3})
    template = one.config_template(True, True, True)["channel_unit_cfg"]
    other = prepared(json.loads(json.dumps(template)), UNTRACEABLE)
    assert other.current_choices == {FIRST: 4, SECOND: 12, THIRD: 3} and other.supernet.first is not None
    with pytest.raises(FastslimRuntimeError, match="found without running the model"):
        _ = other.trace
    both = copy.deepcopy({"mutator": other, "model": other.supernet})
    both["mutator"].set_max_choices()
    x = torch.randn(1, *SHAPE[1:])
    assert (other.supernet.first(x).shape[1], both["model"].first(x).shape[1]) == (4, 8)


@pytest.mark.parametrize("parse_cfg", [dict(type="Config", demo_input=SHAPE), UNTRACEABLE])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda units: units[FIRST]["channels"]["output_related"][0].update(name="stem.first"), "does not have"),
        (lambda units: units[FIRST]["channels"]["output_related"][0].update(end=80), "0 to 80 of 'first', which has 8"),
    ],
)
def test_units_of_another_model_are_refused(parse_cfg, change, message):
    template = prepared(HALVES).config_template(True, True, True)["channel_unit_cfg"]
    change(template["units"])
    model = Net()
    with pytest.raises(FastslimValueError, match=f"{message}.*is the config of another model"):
        prepared(template, parse_cfg, model=model)
    assert type(model.first) is nn.Conv2d


def test_a_units_file_of_another_width_is_refused():
    config = dict(HALVES, units={FIRST: dict(init_args=dict(num_channels=16))})
    with pytest.raises(FastslimValueError, match="another number of channels: 16, but the model's unit has 8"):
        prepared(config)
    other = dict(HALVES, units={"first_(0, 16)_16": dict(choice=8)})
    with pytest.raises(FastslimValueError, match="no unit of this model; did you mean"):
        prepared(other)


def test_units_that_claim_the_same_channels_are_refused():
    template = prepared(HALVES).config_template(True, True, True)["channel_unit_cfg"]
    template["units"]["again"] = template["units"][FIRST]
    model = Net()
    with pytest.raises(FastslimValueError, match="units 'again' and 'first.* both have channels of 'bn'"):
        prepared(template, UNTRACEABLE, model=model)
    assert type(model.first) is nn.Conv2d


def test_a_misspelt_argument_of_a_unit_names_the_nearest():
    with pytest.raises(FastslimTypeError, match="'candidate_choice': did you mean 'candidate_choices'"):
        prepared(dict(type="OneShotMutableChannelUnit", default_args=dict(candidate_choice=[0.5])))


def test_a_config_without_channels_needs_a_trace():
    with pytest.raises(FastslimRuntimeError, match="needs units with their channels, but unit .* does not say"):
        prepared(dict(HALVES, units={FIRST: dict(choice=4)}), UNTRACEABLE)
    with pytest.raises(FastslimRuntimeError, match="it lists no units"):
        prepared(HALVES, UNTRACEABLE)


def test_a_choice_that_is_none_leaves_the_model_as_it_was():
    model = Net()
    with pytest.raises(FastslimValueError, match=r"5 is no choice of unit .* widths: \[4, 8\]"):
        prepared(dict(HALVES, units={FIRST: dict(choice=5)}), model=model)
    assert type(model.first) is nn.Conv2d
    with pytest.raises(FastslimTypeError, match="must be a torch.nn.Module, got dict"):
        OneShotChannelMutator().prepare_from_supernet({})


def test_units_of_a_mutator_tell_the_layers_however_they_are_set():
    model = Net()
    mutator = prepared(dict(type=SequentialMutableChannelUnit), model=model)
    x = torch.randn(1, *SHAPE[1:])
    mutator.name2unit[FIRST].mutable_channel.current_choice = 3
    assert model.first(x).shape[1] == 3 and mutator.current_choices[FIRST] == 3
    assert [c.name for c in mutator.name2unit[THIRD].output_related] == ["right", "joined"]
    assert mutator.name2unit[FIRST].output_related[0].module is model.first


def test_double_precision_and_padding_modes_stay():
    model = randomise_statistics(Net().double())
    full = model(x := torch.randn(2, *SHAPE[1:], dtype=torch.float64))
    mutator = prepared(HALVES, model=model)
    torch.testing.assert_close(model(x), full)
    mutator.set_min_choices()
    assert model(x).dtype == torch.float64 and model.first.padding_mode == "reflect"
