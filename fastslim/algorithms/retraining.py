"""MMRazor 0.x's ``retraining=True``: a pruner's listed subnets, trained on the labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastslim import errors
from fastslim.algorithms.parts import build_part, deployed
from fastslim.algorithms.slimmable import Choices
from fastslim.mutators import ChannelMutator, RatioPruner

_TWELFTHS = [i / 12 for i in range(2, 13)]


def prepare_retraining(
    architecture: nn.Module, pruner: Any, example_inputs: Any, channel_cfg: Any
) -> tuple[nn.Module, ChannelMutator, list[Choices]]:
    """Makes an architecture what is retrained.

    Args:
        architecture: the network.
        pruner: a :class:`RatioPruner`, its config, or None.
        example_inputs: what the network is traced with, where the pruner does not say it.
        channel_cfg: one subnet, which becomes the whole network; or a list of them, which are trained together,
            each with a set of batch norm parameters and statistics of its own. A subnet is a dict from layer to
            channels as ``RatioPruner.export_subnet`` makes it, one from unit to width, or the path of a JSON or
            YAML file with either.

    Returns:
        The network, what chooses its widths, and the subnets: none where there is nothing to choose.

    Raises:
        FastslimTypeError: no subnet, or one of another kind.
        FastslimValueError: one that does not fit the network.
    """
    if pruner is None:
        pruner = dict(type="RatioPruner", ratios=_TWELFTHS)
    if isinstance(pruner, Mapping) and example_inputs is not None:
        pruner = {"example_inputs": example_inputs, **pruner}
    built = build_part("pruner", pruner, RatioPruner)
    listed = list(channel_cfg) if isinstance(channel_cfg, (list, tuple)) else [channel_cfg]
    for subnet in listed or [channel_cfg]:
        if not isinstance(subnet, (Mapping, str, Path)):
            raise errors.FastslimTypeError(
                "retraining=True needs channel_cfg: a subnet (a dict, or the path of a JSON or YAML file), or a list "
                f"of subnets, but got {subnet!r:.100}"
            )
    together = isinstance(channel_cfg, (list, tuple))
    if together:
        built.convert_switchable_bn(architecture, len(listed))
    built.prepare_from_supernet(architecture)
    subnets = [built.choices_of(subnet) for subnet in listed]
    if together:
        return architecture, built, subnets
    built.switch_subnet(subnets[0])
    return *deployed(built), []
