"""Hand out a subnet as a plain network: ordinary torch layers of exactly its size, nothing of fastslim inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastslim.algorithms.slimmable import SlimmableAlgorithm
from fastslim.errors import FastslimTypeError
from fastslim.mutators import ChannelMutator, mutator_of
from fastslim.mutators.plain_copy import plain_copy


def export_subnet(
    source: SlimmableAlgorithm | ChannelMutator | nn.Module, subnet: Mapping[str, Any] | None = None
) -> nn.Module:
    """A subnet as a plain network, with copies of the weights it uses.

    The network's own classes and forward stay, with plain torch layers inside. Where a forward mentions channel
    counts as constants, that module becomes a `torch.fx.GraphModule` of its recorded forward, which holds for
    arguments like the example inputs', and in evaluation mode only where training mode computes something else than
    other constants (it says so when it is called). The result needs no fastslim to run or to load.

    Args:
        source: an AutoSlim, a mutator, or a model that `fastslim.convert` has converted; it stays as it is.
        subnet: width by unit name, as the mutator's `set_choices` takes it; the present one when None.

    Returns:
        The network, in the mode (training or evaluation) of the source.

    Raises:
        FastslimTypeError: when source holds no subnets.
        FastslimValueError: when subnet does not fit.
    """
    mutator = _mutator(source)
    before = mutator.current_choices
    if isinstance(source, SlimmableAlgorithm) and subnet is not None:
        return _at(source, mutator, subnet)
    if subnet is not None:
        mutator.set_choices(subnet)
    try:
        return plain_copy(mutator)
    finally:
        mutator.set_choices(before)


def _mutator(source: Any) -> ChannelMutator:
    if isinstance(source, ChannelMutator):
        return source
    mutator = source.mutator if isinstance(source, SlimmableAlgorithm) else None
    if mutator is None and isinstance(source, nn.Module):
        mutator = mutator_of(source)
    if mutator is None:
        raise FastslimTypeError(
            f"export_subnet takes an AutoSlim, a mutator or a model converted by fastslim.convert, "
            f"got {type(source).__name__}"
        )
    return mutator


def _at(algorithm: SlimmableAlgorithm, mutator: ChannelMutator, subnet: Mapping[str, Any]) -> nn.Module:
    """With the batch-norm statistics that are calibrated for the subnet."""
    before = mutator.current_choices
    algorithm.set_subnet(subnet)
    try:
        return plain_copy(mutator)
    finally:
        algorithm.set_subnet(before)
