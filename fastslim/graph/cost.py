"""Multiply-adds and parameters of a subnet, from its widths alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastslim.errors import FastslimValueError, nearest
from fastslim.graph.units import LayerSpec, active

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
    return Cost(
        sum(layer_multiply_adds(layer, ordered) for layer in trace.layers.values()),
        sum(
            math.prod(active(dim, ordered, trace.units)[0] for dim in trace.tensors[name]) for name in trace.parameters
        ),
    )


def layer_multiply_adds(layer: LayerSpec, widths: Sequence[int]) -> int:
    """Multiply-adds of one layer, for one sample; 0 for normalisation and embeddings.

    Products between activations (attention scores) are not counted.

    Args:
        layer: of a trace.
        widths: one for each of ``layer.units``, in their order.
    """
    if layer.kind not in ("conv", "conv_transpose", "linear", "attention"):
        return 0
    out, _ = active(layer.out, widths, layer.units)
    reads, _ = active(layer.input_dim, widths, layer.units)
    if layer.kind == "attention":
        heads, key, value = (active(dim, widths, layer.units)[0] for dim in (layer.heads, layer.key, layer.value))
        return (heads * (reads + key + value) + heads * out) * layer.out_positions
    return out * (layer.in_per_group or reads) * layer.kernel * layer.out_positions
