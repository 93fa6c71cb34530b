"""OneShotChannelMutator: every unit has a list of widths, from which subnets are sampled."""

from __future__ import annotations

from typing import Any

from fastslim.mutators.channel_mutator import ChannelMutator
from fastslim.registry import MODELS


@MODELS.register_module()
class OneShotChannelMutator(ChannelMutator):
    """Samples subnets from candidate widths; see `ChannelMutator` for the arguments.

    With its defaults every unit may take i/12 of its channels, i = 2 ... 12, rounded to multiples of 8.
    Source: Yu and Huang, AutoSlim (2019), section 3; the ratios are those of MMRazor's configs.
    """

    default_unit: Any = dict(
        type="OneShotMutableChannelUnit",
        default_args=dict(candidate_choices=[i / 12 for i in range(2, 13)], choice_mode="ratio", divisor=8),
    )
