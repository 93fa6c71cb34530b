"""Multiply-adds and parameters of a subnet, from its widths alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastslim.errors import FastslimValueError, nearest
from fastslim.graph.units import LayerSpec

if TYPE_CHECKING:
    from fastslim.graph.trace import Trace


@dataclass(frozen=True)
class Cost:
    """What a subnet costs.

    Attributes:
        multiply_adds: of convolutions and linear layers, for one sample (one multiply-add = 2 FLOPs).
        parameters: of the whole network.
    """

    multiply_adds: int
    parameters: int


def count_cost(trace: Trace, widths: Mapping[str, int]) -> Cost:
    """Counts a subnet's multiply-adds and parameters; microseconds per layer, nothing is run.

    Args:
        trace: of the supernet.
        widths: active channels by unit name; a unit left out is at full width.

    Returns:
        The cost of one sample of the example inputs' size.

    Raises:
        FastslimValueError: for a unit that does not exist.
    """
    known = {unit.name for unit in trace.units}
    for name in widths:
        if name not in known:
            raise FastslimValueError(f"no unit is called {name!r}; {nearest(name, known)}")
    ordered = [widths.get(unit.name, unit.channels) for unit in trace.units]
    multiply_adds, parameters = 0, trace.other_parameters
    for layer in trace.layers.values():
        more_multiply_adds, more_parameters = layer_cost(layer, ordered)
        multiply_adds += more_multiply_adds
        parameters += more_parameters
    return Cost(multiply_adds, parameters)


def layer_cost(layer: LayerSpec, widths: Sequence[int]) -> tuple[int, int]:
    """Multiply-adds (of one sample) and parameters of one layer.

    Args:
        layer: of a trace.
        widths: one for each of ``layer.units``, in their order.
    """
    units = layer.units
    out = sum(count if unit is None else count * widths[unit] // units[unit].channels for unit, count in layer.out)
    if layer.kind == "bn":
        return 0, 2 * out if layer.bias else 0
    reads = layer.in_per_group or sum(
        count if unit is None else count * widths[unit] // units[unit].channels for unit, _, count in layer.inputs
    )
    weights = out * reads * layer.kernel
    return weights * layer.out_positions, weights + (out if layer.bias else 0)
