"""Whose subnets are asked for, and what is counted of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastslim.algorithms.slimmable import SlimmableAlgorithm
from fastslim.errors import FastslimTypeError, FastslimValueError, nearest
from fastslim.graph import Cost, count_cost
from fastslim.mutators import ChannelMutator, mutator_of

Source = SlimmableAlgorithm | ChannelMutator | nn.Module


def cost_of(source: Source, subnet: Mapping[str, Any] | None = None) -> Cost:
    """What a subnet costs, counted without running anything; microseconds.

    Args:
        source: an AutoSlim, a mutator, or a model that `fastslim.convert` has converted; it stays as it is.
        subnet: width by unit name; a unit left out is at full width. The present subnet when None.

    Returns:
        Multiply-adds, parameters, bytes of weights and the peak of the activations' memory, as the exported subnet
        has them; see `fastslim.graph.Cost`.

    Raises:
        FastslimTypeError: when source holds no subnets.
        FastslimValueError: for a unit that does not exist, or a width that is no choice of it.
    """
    mutator = mutator_behind(source, "cost_of")
    return count_cost(mutator.trace, widths_of(mutator, mutator.current_choices if subnet is None else subnet))


def mutator_behind(source: Any, caller: str) -> ChannelMutator:
    """The mutator that knows the subnets of `source`.

    Raises:
        FastslimTypeError: there is none.
    """
    if isinstance(source, ChannelMutator):
        return source
    mutator = source.mutator if isinstance(source, SlimmableAlgorithm) else None
    if mutator is None and isinstance(source, nn.Module):
        mutator = mutator_of(source)
    if mutator is None:
        raise FastslimTypeError(
            f"{caller} takes an AutoSlim, a mutator or a model converted by fastslim.convert, "
            f"got {type(source).__name__}"
        )
    return mutator


def widths_of(mutator: ChannelMutator, subnet: Mapping[str, Any]) -> dict[str, int]:
    """A subnet's widths by unit name, checked.

    Raises:
        FastslimTypeError: it is no dict.
        FastslimValueError: an unknown unit, or a width that is no choice of it.
    """
    if not isinstance(subnet, Mapping):
        raise FastslimTypeError(f"a subnet is a dict from unit name to width, got {type(subnet).__name__}")
    units = {unit.name: unit for unit in mutator.units}
    widths = {}
    for name, choice in subnet.items():
        if name not in units:
            raise FastslimValueError(f"no unit is called {name!r}; {nearest(str(name), units)}")
        widths[name] = units[name].as_width(choice)
    return widths
