"""Channel units, their choices, and how subnets are sampled."""

from fastslim.mutators.analyzer import ChannelAnalyzer
from fastslim.mutators.channel_mutator import ChannelMutator
from fastslim.mutators.convert import convert, mutator_of, one_shot_units
from fastslim.mutators.one_shot import OneShotChannelMutator
from fastslim.mutators.ratio_pruner import RatioPruner
from fastslim.mutators.slimmable import SlimmableChannelMutator
from fastslim.mutators.sort_channels import sort_channels
from fastslim.mutators.units import OneShotMutableChannelUnit, SequentialMutableChannelUnit, SlimmableChannelUnit

__all__ = [
    "ChannelAnalyzer",
    "ChannelMutator",
    "OneShotChannelMutator",
    "OneShotMutableChannelUnit",
    "RatioPruner",
    "SequentialMutableChannelUnit",
    "SlimmableChannelMutator",
    "SlimmableChannelUnit",
    "convert",
    "mutator_of",
    "one_shot_units",
    "sort_channels",
]
