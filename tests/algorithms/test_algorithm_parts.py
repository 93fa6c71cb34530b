"""The parts of an algorithm: objects or configs, in the order of either generation of MMRazor 1.x."""

from __future__ import annotations

import copy
from typing import Any

import plain_loop
import pytest
import torch
from torch import nn

import fastslim
from fastslim.algorithms import SlimmableNetwork
from fastslim.algorithms.parts import is_part
from fastslim.distillers import ConfigurableDistiller
from fastslim.mutators import ChannelMutator, OneShotChannelMutator, SlimmableChannelMutator

PARSE = dict(type="ChannelAnalyzer", demo_input=(1, 3, 12, 12))
ONE_SHOT = dict(type="OneShotChannelMutator", parse_cfg=PARSE, seed=0)
LISTED = dict(type="SlimmableChannelMutator", parse_cfg=PARSE)
FC = dict(fc=dict(type="ModuleOutputs", source="fc"))
DISTILLER = dict(
    type="ConfigurableDistiller",
    teacher_recorders=FC,
    student_recorders=FC,
    distill_losses=dict(loss_soft=dict(type="KLDivergence")),
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return plain_loop.ConcatNet()


@pytest.mark.parametrize(
    "arguments",
    [
        lambda net: (ONE_SHOT, DISTILLER, net),
        lambda net: (net, ONE_SHOT, DISTILLER),
        lambda net: (net, OneShotChannelMutator(parse_cfg=PARSE, seed=0), DISTILLER),
    ],
    ids=["guide", "1.0.0", "1.0.0 with an object"],
)
def test_autoslim_takes_its_parts_in_either_order(arguments) -> None:
    net = network()
    algo = fastslim.AutoSlim(*copy.deepcopy(arguments(net)))
    assert isinstance(algo.mutator, OneShotChannelMutator)
    assert isinstance(algo.distiller, ConfigurableDistiller)
    losses = algo.accumulate((torch.randn(4, 3, 12, 12), torch.tensor([1, 2, 3, 4])))
    assert list(losses)[:2] == ["max_subnet.loss", "min_subnet.loss_soft"]


def test_a_network_alone_is_enough() -> None:
    net = network()
    assert fastslim.AutoSlim(net, input_shape=(1, 3, 12, 12)).architecture is net


def test_slimmable_network_takes_its_parts_in_either_order() -> None:
    for arguments in ((LISTED, network()), (network(), LISTED), (SlimmableChannelMutator(parse_cfg=PARSE), network())):
        algo = SlimmableNetwork(*arguments, 1)
        assert isinstance(algo.mutator, SlimmableChannelMutator)
        assert algo.is_deployed


def test_a_wrong_part_is_named_where_the_others_are_right() -> None:
    for mutator in (object(), dict(type="ConfigurableDistiller")):
        with pytest.raises(TypeError, match="mutator should be a `dict` or `OneShotChannelMutator` instance, but got"):
            fastslim.AutoSlim(mutator, None, network(), input_shape=(1, 3, 12, 12))


@pytest.mark.parametrize(
    ("given", "kind", "expected"),
    [
        (ONE_SHOT, ChannelMutator, True),
        (dict(type="fastslim.SelfDistiller", components=[]), ConfigurableDistiller, True),
        (dict(type=OneShotChannelMutator), ChannelMutator, True),
        (OneShotChannelMutator(), ChannelMutator, True),
        (DISTILLER, ChannelMutator, False),
        (dict(type="NoSuchThing"), ChannelMutator, False),
        (dict(), ChannelMutator, False),
        (None, ChannelMutator, False),
    ],
)
def test_what_is_a_part(given: Any, kind: type[Any], expected: bool) -> None:
    assert is_part(given, kind) is expected


@pytest.mark.parametrize("option", [dict(choices=[0.5, 1.0]), dict(divisor=2)])
def test_options_of_units_are_refused_where_a_mutator_is_given(option) -> None:
    with pytest.raises(ValueError, match="give them to the mutator itself"):
        fastslim.AutoSlim(dict(type="OneShotChannelMutator"), architecture=plain_loop.ConcatNet(), **option)
    with pytest.raises(ValueError, match="give them to the mutator itself"):
        fastslim.AutoSlim(fastslim.mutators.OneShotChannelMutator(), architecture=plain_loop.ConcatNet(), seed=1)


def test_a_mutators_config_takes_the_seed_beside_it() -> None:
    config = dict(type="OneShotChannelMutator")
    algos = [
        fastslim.AutoSlim(config, architecture=plain_loop.ConcatNet(), input_shape=(3, 12, 12), seed=seed)
        for seed in (7, 7, 8)
    ]
    drawn = [[algo.sample_subnet() for _ in range(5)] for algo in algos]
    assert drawn[0] == drawn[1] != drawn[2]
    assert config == dict(type="OneShotChannelMutator")
