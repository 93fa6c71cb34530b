"""Units on their own, without a mutator."""

import copy
import json

import pytest
import torch
from torch import nn
from unit_cases import FIRST, SECOND, SHAPE, THIRD, Net, randomise_statistics

from fastslim.errors import FastslimTypeError, FastslimValueError
from fastslim.models import resnet18
from fastslim.mutators import (
    Channel,
    ChannelAnalyzer,
    ChannelUnit,
    MutableChannelUnit,
    OneShotChannelMutator,
    OneShotMutableChannel,
    OneShotMutableChannelUnit,
    SequentialMutableChannel,
    SequentialMutableChannelUnit,
    SlimmableChannelUnit,
)
from fastslim.nn import DynamicChannelMixin, SlimBatchNorm2d, SlimConv2d, SwitchableBatchNorm2d

ANALYZER = dict(type="ChannelAnalyzer", demo_input=SHAPE)
KINDS = [SequentialMutableChannelUnit, OneShotMutableChannelUnit, SlimmableChannelUnit]


def prepared(kind, model, **arguments):
    units = [
        kind.init_from_channel_unit(unit, arguments) for unit in ChannelUnit.init_from_channel_analyzer(model, ANALYZER)
    ]
    for unit in units:
        unit.prepare_for_pruning(model)
    return {unit.name: unit for unit in units}


def test_units_have_the_channels_of_their_layers():
    units = {unit.name: unit for unit in ChannelUnit.init_from_channel_analyzer(Net(), ChannelAnalyzer(SHAPE))}
    assert list(units) == [FIRST, SECOND, THIRD] and units[FIRST].alias == FIRST
    names = [channel.name for channel in units[FIRST].output_related]
    assert names == ["first", "bn", "same", "depthwise"]
    assert [c.name for c in units[FIRST].input_related] == ["bn", "same", "depthwise", "left", "right"]
    third = units[THIRD]
    assert [(c.name, c.index) for c in third.output_related] == [("right", (0, 6)), ("joined", (12, 18))]
    assert [(c.name, c.index) for c in third.input_related] == [("joined", (12, 18)), ("fc", (48, 72))]
    assert third.input_related[1].num_channels == 24 and not third.input_related[1].is_mutable


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [SequentialMutableChannelUnit, OneShotMutableChannelUnit])
def test_units_alone_give_what_a_mutator_gives(kind, dtype):
    model, arguments = randomise_statistics(Net().to(dtype)), dict(choice_mode="ratio")
    if kind is OneShotMutableChannelUnit:
        arguments["candidate_choices"] = [i / 6 for i in range(1, 7)]
    reference = copy.deepcopy(model)
    mutator = OneShotChannelMutator(dict(type=kind, default_args=arguments), example_inputs=SHAPE)
    mutator.prepare_from_supernet(reference)
    x = torch.randn(2, *SHAPE[1:], dtype=dtype)
    full = model(x)
    units = prepared(kind, model, **arguments)
    assert all(unit.is_mutable for unit in units.values())
    torch.testing.assert_close(model(x), full)
    for _ in range(5):
        for name, width in mutator.sample_choices().items():
            units[name].current_choice = mutator.name2unit[name].current_choice = width
        torch.testing.assert_close(model(x), reference(x))


def test_layers_of_prepared_units_are_dynamic():
    model = resnet18(num_classes=10)
    units = SequentialMutableChannelUnit.init_from_channel_analyzer(model)
    for unit in units:
        unit.prepare_for_pruning(model)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            assert isinstance(module, DynamicChannelMixin)
    for unit in units:
        choice = unit.sample_choice()
        unit.current_choice = choice
        assert unit.current_choice == choice
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_slimmable_units_give_batch_norms_statistics_for_every_width():
    model = Net()
    units = prepared(SlimmableChannelUnit, model, candidate_choices=[0.5, 1.0], choice_mode="ratio")
    assert isinstance(model.bn, SwitchableBatchNorm2d) and set(model.bn.candidate_bn) == {"4"}
    units[FIRST].current_choice = 0.5
    model.bn(torch.randn(2, 4, 3, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_can_be_made_from_its_template(kind):
    unit = kind(
        48, divisor=8, choice_mode="ratio", **({} if kind is KINDS[0] else {"candidate_choices": [0.3, 0.5, 1.0]})
    )
    unit.add_output_related(Channel("conv", None, (0, 48)))
    unit.add_input_related(Channel("fc", None, (96, 144), is_output_channel=False))
    unit.current_choice = 0.5
    config = json.loads(json.dumps(unit.config_template(with_init_args=True, with_channels=True)))
    other = kind.init_from_cfg(nn.Module(), config)
    assert other.config_template(True, True) == unit.config_template(True, True) == config
    assert other.name == "conv_(0, 48)_48" and other.candidate_widths == unit.candidate_widths
    assert unit.config_template() == {"choice": 0.5} and kind(8).name == "unitx_8"
    with pytest.raises(FastslimValueError, match="did you mean 'init_args'"):
        kind.init_from_cfg(None, {"init_arg": {}})


def test_ends_of_channels_are_filled_in():
    config = dict(init_args=dict(num_channels=8), channels=dict(input_related=[dict(name="left")], output_related=[]))
    unit = SequentialMutableChannelUnit.init_from_cfg(Net(), config)
    assert [(c.name, c.index, c.is_output_channel) for c in unit.input_related] == [("left", (0, 8), False)]


def test_channels_are_added_once_and_on_their_own_side():
    unit, channel = ChannelUnit(8), Channel("conv", None, (0, 8))
    unit.add_output_related(channel)
    unit.add_output_related(Channel("conv", None, (0, 8)))
    assert unit.output_related == [channel] and not unit.input_related
    with pytest.raises(FastslimTypeError, match="input channels are needed"):
        unit.add_input_related(channel)
    with pytest.raises(FastslimTypeError, match="output channels are needed"):
        unit.add_output_related("conv")


def test_a_unit_is_mutable_when_all_its_layers_are():
    unit = SequentialMutableChannelUnit(8)
    assert unit.is_mutable  # nothing is known against it
    unit.add_output_related(Channel("conv", SlimConv2d(3, 8, 1), (0, 8)))
    assert not unit.is_mutable  # nobody reads them: they are the model's output
    unit.add_input_related(Channel("relu", nn.ReLU(), (0, 8), is_output_channel=False))
    assert not unit.is_mutable
    unit.add_input_related(Channel("bn", SlimBatchNorm2d(8), (0, 8), is_output_channel=False))
    assert unit.is_mutable
    unit.add_input_related(Channel("other", nn.Linear(8, 8), (0, 8), is_output_channel=False))
    assert not unit.is_mutable
    assert not Channel("output_placeholder", None, (0, 8)).is_mutable and Channel("cat", None, (0, 8)).is_mutable


@pytest.mark.parametrize(
    ("name", "index", "message"),
    [
        ("layer.lefty", (0, 8), "a layer 'layer.lefty', which this model does not have"),
        ("lefty", (0, 8), "a layer 'lefty', .*did you mean 'left'.*: is the config of another model"),
        ("left", (0, 9), "channels 0 to 9 of 'left', which has 8"),
        ("left", (4, 4), "channels 4 to 4"),
    ],
)
def test_channels_of_another_model_are_refused_and_nothing_is_changed(name, index, message):
    model, unit = Net(), SequentialMutableChannelUnit(8)
    unit.add_input_related(Channel(name, None, index, is_output_channel=False))
    with pytest.raises(FastslimValueError, match=message):
        unit.prepare_for_pruning(model)
    assert not any(isinstance(module, DynamicChannelMixin) for module in model.modules())


def test_a_unit_of_a_mutable_has_its_candidates():
    channel = OneShotMutableChannel(12, [2, 8, 12])
    channel.current_choice = 8
    for kind in (SequentialMutableChannelUnit, OneShotMutableChannelUnit):
        unit = kind.init_from_mutable_channel(channel)
        assert unit.mutable_channel is channel and unit.candidate_choices == [2, 8, 12] and unit.current_choice == 8
    unit.current_choice = 2
    assert channel.current_choice == 2 and isinstance(unit, MutableChannelUnit)
    free = SequentialMutableChannelUnit.init_from_mutable_channel(SequentialMutableChannel(3, "ratio"))
    assert free.candidate_choices == [1 / 3, 2 / 3, 1.0]
