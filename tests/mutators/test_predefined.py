"""Models whose layers follow mutables before any mutator sees them."""

import copy
import json

import pytest
import torch
from torch import nn

from fastslim.algorithms import AutoSlim
from fastslim.errors import FastslimRuntimeError, FastslimTypeError
from fastslim.mutators import (
    BaseMutable,
    ChannelMutator,
    DerivedMutable,
    MutableChannelContainer,
    MutableChannelUnit,
    OneShotChannelMutator,
    OneShotMutableChannel,
    OneShotMutableChannelUnit,
    SequentialMutableChannel,
    SlimmableChannelMutator,
    register_channel_containers,
)
from fastslim.nn import DynamicBatchNorm2d, DynamicConv2d, DynamicLinear, SlimConv2d, SlimLinear

PREDEFINED = dict(type="Predefined")
ONE_SHOT = dict(type="OneShotMutableChannelUnit", default_args={})


class Repeat(BaseMutable):
    """A user's own, which derives a mutable with a function of their own."""

    def __mul__(self, other):
        def mask():
            return other.current_mask.unsqueeze(-1).expand(-1, 1).flatten()

        return DerivedMutable(mask, mask, [self, other])


class Dynamic(nn.Module):
    """Two units; the first is read through a derived mutable, the second four times by a linear layer."""

    def __init__(self, containers=True):
        super().__init__()
        self.net = nn.Sequential(
            DynamicConv2d(3, 8, 3, padding=1),
            DynamicBatchNorm2d(8),
            nn.ReLU(),
            DynamicConv2d(8, 16, 3, padding=1),
            DynamicBatchNorm2d(16),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.linear = DynamicLinear(64, 10)
        one, two = OneShotMutableChannel(8, [1, 4, 8]), OneShotMutableChannel(16, [2, 8, 16])
        if containers:
            MutableChannelUnit._register_channel_container(self, MutableChannelContainer)
            register = MutableChannelContainer.register_mutable_channel_to_module
            register(self.net[0], one, True)
            register(self.net[1], one.expand_mutable_channel(1), True, 0, 8)
            register(self.net[3], Repeat() * one, False, 0, 8)
            register(self.net[3], two, True)
            register(self.net[4], two, True)
            register(self.linear, two * 4, False)
        else:
            for layer, reads, makes in (
                (self.net[0], None, one),
                (self.net[1], one, None),
                (self.net[3], one, two),
                (self.net[4], two, None),
                (self.linear, two * 4, None),
            ):
                if reads is not None:
                    layer.register_mutable_attr("in_channels", reads)
                if makes is not None:
                    layer.register_mutable_attr("out_channels", makes)

    def forward(self, x):
        return self.linear(self.net(x))


X = torch.randn(2, 3, 8, 8)


def prepared(model, kind=ChannelMutator, config=ONE_SHOT):
    mutator = kind(channel_unit_cfg=config, parse_cfg=PREDEFINED)
    mutator.prepare_from_supernet(model)
    return mutator


@pytest.mark.parametrize("containers", [True, False])
def test_units_are_those_of_the_mutables(containers):
    model = Dynamic(containers)
    mutator = prepared(model)
    assert [unit.candidate_choices for unit in mutator.mutable_units] == [[1, 4, 8], [2, 8, 16]]
    assert list(mutator.name2unit) == ["net.0_(0, 8)_8", "net.3_(0, 16)_16"]
    assert [c.name for c in mutator.units[0].input_related] == ["net.1", "net.3"]
    assert model(X).shape == (2, 10) and not mutator.is_traced
    for _ in range(5):
        mutator.set_choices(mutator.sample_choices())
        assert model.net[:5](X).shape[1] == mutator.units[1].width and model(X).shape == (2, 10)
    mutator.set_min_choices()
    assert model.net[:3](X).shape[1] == 1
    json.dumps(mutator.config_template(False, True, True))


def test_a_predefined_network_trains_as_a_converted_one():
    torch.manual_seed(0)
    dynamic, converted = Dynamic(), Dynamic(containers=False)
    converted.net = nn.Sequential(*(getattr(layer, "_plain", type(layer))(*sizes) for layer, sizes in zip(
        dynamic.net, [(3, 8, 3, 1, 1), (8,), (), (8, 16, 3, 1, 1), (16,), (2,), ()], strict=True
    )))  # fmt: skip
    converted.linear = nn.Linear(64, 10)
    converted.load_state_dict(dynamic.state_dict())
    units = {
        name: dict(init_args=dict(candidate_choices=choices, choice_mode="number"))
        for name, choices in (("net.0_(0, 8)_8", [1, 4, 8]), ("net.3_(0, 16)_16", [2, 8, 16]))
    }
    algorithms = [
        AutoSlim(OneShotChannelMutator(ONE_SHOT, PREDEFINED, seed=3), None, dynamic, fuse=False),
        AutoSlim(OneShotChannelMutator(dict(ONE_SHOT, units=units), example_inputs=X, seed=3), None, converted),
    ]
    optimizers = [torch.optim.SGD(algorithm.parameters(), 0.1, momentum=0.9) for algorithm in algorithms]
    for _ in range(4):
        batch = torch.randn(4, 3, 8, 8), torch.randint(0, 10, (4,))
        first, second = (a.train_step(batch, o) for a, o in zip(algorithms, optimizers, strict=True))
        torch.testing.assert_close(first, second)
    torch.testing.assert_close(dynamic.state_dict(), converted.state_dict())


def test_predefined_choices_stay_when_asked_for():
    for arguments, width in ((dict(unit_predefined=True), 4), (dict(unit_predefined=False), 8), ({}, 8)):
        model = Dynamic(containers=False)
        model.net[0].mutable_out_channels.current_choice = 4
        mutator = prepared(model, config=dict(type=OneShotMutableChannelUnit, default_args=arguments))
        assert mutator.units[0].width == width


def test_a_copy_of_model_and_mutator_keeps_to_itself():
    model = Dynamic()
    mutator = prepared(model)
    other, other_mutator = copy.deepcopy((model, mutator))
    other_mutator.set_min_choices()
    assert (other.net[:1](X).shape[1], model.net[:1](X).shape[1]) == (1, 8)
    assert other_mutator.is_prepared_for(other) and not other_mutator.is_prepared_for(model)


def test_the_mutables_may_be_set_without_the_mutator():
    model = Dynamic(containers=False)
    mutator = prepared(model)
    model.net[0].mutable_out_channels.current_choice = 4
    assert mutator.current_choices["net.0_(0, 8)_8"] == 4 and model.net[:1](X).shape[1] == 4


def test_slimmable_units_of_predefined_models_list_their_subnets():
    mutator = prepared(Dynamic(), SlimmableChannelMutator, dict(type="SlimmableChannelUnit"))
    assert [list(subnet.values()) for subnet in mutator.subnets] == [[1, 2], [4, 8], [8, 16]]


def test_a_model_of_slim_layers_is_traced():
    model = nn.Sequential(SlimConv2d(3, 8, 3), nn.Flatten(), SlimLinear(8 * 36, 4))
    mutator = ChannelMutator(parse_cfg=PREDEFINED, example_inputs=(1, 3, 8, 8))
    mutator.prepare_from_supernet(model)
    assert mutator.is_traced and next(iter(mutator.name2unit)) == "0_(0, 8)_8" and model[0] is mutator.layers["0"]


def test_other_ways_of_finding_units_are_refused_where_layers_follow_mutables():
    with pytest.raises(FastslimRuntimeError, match=r"use parse_cfg=dict\(type='Predefined'\)"):
        ChannelMutator(example_inputs=(1, 3, 8, 8)).prepare_from_supernet(Dynamic())


def test_containers_go_where_there_are_none_yet():
    layer = DynamicConv2d(4, 8, 1)
    mutable = SequentialMutableChannel(4)
    layer.register_mutable_attr("in_channels", mutable)
    with pytest.raises(FastslimTypeError, match="have no container; call register_channel_containers first"):
        MutableChannelContainer.register_mutable_channel_to_module(layer, mutable, False)
    register_channel_containers(nn.Sequential(layer, DynamicBatchNorm2d(8, affine=False, track_running_stats=False)))
    assert layer.mutable_in_channels is mutable and layer.mutable_out_channels.num_channels == 8
    part = SequentialMutableChannel(3)
    MutableChannelContainer.register_mutable_channel_to_module(layer, part, True, start=2)
    part.current_choice = 1
    assert layer(torch.randn(1, 4, 2, 2)).shape[1] == 6 and layer.out_segments == ((0, 3), (5, 3))


def test_a_predefined_network_trains_without_a_word_about_plans():
    torch.manual_seed(0)
    algo = AutoSlim(
        dict(type="OneShotChannelMutator", channel_unit_cfg=ONE_SHOT, parse_cfg=PREDEFINED), architecture=Dynamic()
    )
    losses = algo.train_step((X, torch.tensor([1, 2])), torch.optim.SGD(algo.parameters(), lr=0.1))
    assert len(losses) == 4 and "defines its own units" in algo.plan_report[0]
