"""Channel units: which layers' channel counts change together, and how many channels a width gives each layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Segments = tuple[tuple[int, int], ...]
# (unit index or None for always present, entries) of consecutive parts of a dimension.
DimSpec = tuple[tuple[int | None, int], ...]


@dataclass(frozen=True)
class UnitSpec:
    """A group of layers whose channel counts must change together.

    Attributes:
        name: ``{module}_({start}, {end})_{channels}`` of the first layer that produces the channels.
        channels: full width.
        members: names of the layers whose outputs carry these channels.
        mutable: False when the width must stay full.
        reason: why it must; empty when mutable.
        granularity: widths are multiples of it (grouped convolution keeps the size of its groups).
        counted: behind a channel shuffle a narrow network takes as many channels, not the same ones.
    """

    name: str
    channels: int
    members: tuple[str, ...]
    mutable: bool = True
    reason: str = ""
    granularity: int = 1
    counted: bool = False


def active(dim: DimSpec, widths: Sequence[int], units: Sequence[UnitSpec]) -> tuple[int, Segments | None]:
    """Active entries of a dimension, and which: (start, count) ranges, or None for the first ones."""
    if len(dim) == 1:
        unit, channels = dim[0]
        return channels if unit is None else channels * widths[unit] // units[unit].channels, None
    segments: list[tuple[int, int]] = []
    start = total = 0
    for unit, channels in dim:
        count = channels if unit is None else channels * widths[unit] // units[unit].channels
        if segments and segments[-1][0] + segments[-1][1] == start:
            segments[-1] = (segments[-1][0], segments[-1][1] + count)
        elif count:
            segments.append((start, count))
        start += channels
        total += count
    return total, tuple(segments) if len(segments) > 1 or (segments and segments[0][0]) else None


@dataclass(frozen=True)
class LayerSpec:
    """One layer with weights: how its channels follow the units' widths.

    A part of ``channels`` channels that belongs to a unit has ``channels * width // unit.channels`` active ones.

    Attributes:
        name: module name.
        kind: "conv", "conv_transpose", "linear", "bn", "layer_norm", "rms_norm", "group_norm", "instance_norm",
            "prelu", "embedding" or "attention".
        out: (unit index or None for fixed, channels) of each part of the output.
        inputs: (unit index or None, first channel, channels) of each part of the input.
        in_per_group: input channels each output channel reads, for grouped and depthwise convolutions, else None.
        kernel: weights per (input, output) pair: kh * kw of a convolution, else 1.
        bias: parameters per output channel that are no products: 1 for a bias, 2 for scale and shift of a norm.
        out_positions: products of each weight for one sample: H * W of a convolution's output (of a transposed one's
            input), rows per sample of a linear layer.
        units: all units of the trace, to which the indices point.
        heads: parts of the inner channels of an attention layer.
        key: parts of its key.
        value: parts of its value.
        head_dim: channels of one of its heads.
    """

    name: str
    kind: str
    out: DimSpec
    inputs: tuple[tuple[int | None, int, int], ...]
    in_per_group: int | None
    kernel: int
    bias: int
    out_positions: int
    units: tuple[UnitSpec, ...] = field(repr=False)
    heads: DimSpec = ()
    key: DimSpec = ()
    value: DimSpec = ()
    head_dim: int = 1

    @property
    def input_dim(self) -> DimSpec:
        """The parts of the input without their first channels."""
        return tuple((unit, channels) for unit, _, channels in self.inputs)

    def state(self, widths: Sequence[int]) -> dict[str, Any]:
        """What a slim layer must know, by attribute, for one width per unit in the order of `units`."""
        out, out_segments = active(self.out, widths, self.units)
        _, segments = active(self.input_dim, widths, self.units)
        state = {"active_out": out, "segments": segments, "out_segments": out_segments}
        if self.kind == "attention":
            state["active_heads"] = active(self.heads, widths, self.units)[0] // self.head_dim
            for name, dim in (("key_segments", self.key), ("value_segments", self.value)):
                state[name] = active(dim, widths, self.units)[1]
        elif self.kind == "embedding":
            state["segments"] = None
        return state

    def out_width(self, widths: Mapping[str, int]) -> int:
        """Active output channels when the units have these widths (a unit left out is at full width)."""
        return active(self.out, self._in_order(widths), self.units)[0]

    def in_width(self, widths: Mapping[str, int]) -> int:
        """Active input channels when the units have these widths."""
        return active(self.input_dim, self._in_order(widths), self.units)[0]

    def segments(self, widths: Mapping[str, int]) -> Segments | None:
        """Ranges (first channel, count) of the active input channels; None when they are one plain prefix."""
        return active(self.input_dim, self._in_order(widths), self.units)[1]

    def _in_order(self, widths: Mapping[str, int]) -> list[int]:
        return [widths.get(unit.name, unit.channels) for unit in self.units]


def named_apart(units: Sequence[UnitSpec]) -> tuple[UnitSpec, ...]:
    """Two parameters that one module uses directly can produce channels of the same name."""
    seen: Counter[str] = Counter()
    result = []
    for unit in units:
        seen[unit.name] += 1
        result.append(unit if seen[unit.name] == 1 else replace(unit, name=f"{unit.name}#{seen[unit.name]}"))
    return tuple(result)
