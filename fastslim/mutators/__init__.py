"""Channel units, their choices, and how subnets are sampled."""

from fastslim.mutators.analyzer import ChannelAnalyzer
from fastslim.mutators.channel import Channel
from fastslim.mutators.channel_mutator import ChannelMutator
from fastslim.mutators.channel_unit import ChannelUnit
from fastslim.mutators.convert import convert, mutator_of, one_shot_units
from fastslim.mutators.derived_mutable import DerivedMethodMixin, DerivedMutable
from fastslim.mutators.fix_subnet import export_fix_subnet, load_fix_subnet
from fastslim.mutators.l1_unit import L1MutableChannelUnit
from fastslim.mutators.mutable import BaseMutable, DumpChosen
from fastslim.mutators.mutable_channel import (
    BaseMutableChannel,
    OneShotMutableChannel,
    SequentialMutableChannel,
    SimpleMutableChannel,
    SquentialMutableChannel,
)
from fastslim.mutators.mutable_container import MutableChannelContainer, register_channel_containers
from fastslim.mutators.mutable_unit import MutableChannelUnit
from fastslim.mutators.mutable_value import MutableValue, OneShotMutableValue
from fastslim.mutators.one_shot import OneShotChannelMutator
from fastslim.mutators.one_shot_units import OneShotMutableChannelUnit, SlimmableChannelUnit
from fastslim.mutators.ratio_pruner import RatioPruner
from fastslim.mutators.slimmable import SlimmableChannelMutator
from fastslim.mutators.sort_channels import sort_channels
from fastslim.mutators.units import SequentialMutableChannelUnit

__all__ = [
    "BaseMutable",
    "BaseMutableChannel",
    "Channel",
    "ChannelAnalyzer",
    "ChannelMutator",
    "ChannelUnit",
    "DerivedMethodMixin",
    "DerivedMutable",
    "DumpChosen",
    "L1MutableChannelUnit",
    "MutableChannelContainer",
    "MutableChannelUnit",
    "MutableValue",
    "OneShotChannelMutator",
    "OneShotMutableChannel",
    "OneShotMutableChannelUnit",
    "OneShotMutableValue",
    "RatioPruner",
    "SequentialMutableChannel",
    "SequentialMutableChannelUnit",
    "SimpleMutableChannel",
    "SlimmableChannelMutator",
    "SlimmableChannelUnit",
    "SquentialMutableChannel",
    "convert",
    "export_fix_subnet",
    "load_fix_subnet",
    "mutator_of",
    "one_shot_units",
    "register_channel_containers",
    "sort_channels",
]
