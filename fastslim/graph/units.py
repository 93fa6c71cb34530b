"""Channel units: which layers' channel counts change together, and how many channels a width gives each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Segments = tuple[tuple[int, int], ...]


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
    """

    name: str
    channels: int
    members: tuple[str, ...]
    mutable: bool = True
    reason: str = ""
    granularity: int = 1


@dataclass(frozen=True)
class LayerSpec:
    """One convolution, linear or batch-norm layer: how its channels follow the units' widths.

    A part of ``channels`` channels that belongs to a unit has ``channels * width // unit.channels`` active ones.

    Attributes:
        name: module name.
        kind: "conv", "linear" or "bn".
        out: (unit index or None for fixed, channels) of each part of the output.
        inputs: (unit index or None, first channel, channels) of each part of the input.
        in_per_group: input channels each output channel reads, for grouped and depthwise convolutions, else None.
        kernel: weights per (input, output) pair: kh * kw of a convolution, else 1.
        bias: whether the layer has a bias; for bn, whether it has an affine part.
        out_positions: outputs per channel and sample: H * W of a convolution, rows per sample of a linear layer.
        units: all units of the trace, to which the indices point.
    """

    name: str
    kind: str
    out: tuple[tuple[int | None, int], ...]
    inputs: tuple[tuple[int | None, int, int], ...]
    in_per_group: int | None
    kernel: int
    bias: bool
    out_positions: int
    units: tuple[UnitSpec, ...] = field(repr=False)

    def resolve(self, widths: Sequence[int]) -> tuple[int, Segments | None]:
        """Active output channels and input segments for one width per unit, in the order of `units`."""
        units = self.units
        out = 0
        for unit, channels in self.out:
            out += channels if unit is None else channels * widths[unit] // units[unit].channels
        if len(self.inputs) == 1:
            return out, None
        segments: list[tuple[int, int]] = []
        for unit, start, channels in self.inputs:
            count = channels if unit is None else channels * widths[unit] // units[unit].channels
            if segments and segments[-1][0] + segments[-1][1] == start:
                segments[-1] = (segments[-1][0], segments[-1][1] + count)
            else:
                segments.append((start, count))
        return out, tuple(segments) if len(segments) > 1 else None

    def out_width(self, widths: Mapping[str, int]) -> int:
        """Active output channels when the units have these widths (a unit left out is at full width)."""
        return self.resolve(self._in_order(widths))[0]

    def in_width(self, widths: Mapping[str, int]) -> int:
        """Active input channels when the units have these widths."""
        ordered = self._in_order(widths)
        return sum(
            channels if unit is None else channels * ordered[unit] // self.units[unit].channels
            for unit, _, channels in self.inputs
        )

    def segments(self, widths: Mapping[str, int]) -> Segments | None:
        """Ranges (first channel, count) of the active input channels; None when they are one plain prefix."""
        return self.resolve(self._in_order(widths))[1]

    def _in_order(self, widths: Mapping[str, int]) -> list[int]:
        return [widths.get(unit.name, unit.channels) for unit in self.units]


@dataclass(frozen=True)
class Part:
    """Consecutive channels of a tensor that belong to one unit (None: always present)."""

    unit: int | None
    channels: int


Parts = tuple[Part, ...]


def scaled(parts: Parts, factor: int) -> Parts:
    """The parts after every channel has become `factor` consecutive ones."""
    return tuple(Part(part.unit, part.channels * factor) for part in parts)


class UnitTable:
    """Union-find over units while a graph is analysed."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self.names: list[str] = []
        self.channels: list[int] = []
        self.granularity: list[int] = []
        self.reasons: list[str] = []

    def new(self, name: str, channels: int) -> Part:
        """A new unit produced by layer `name`."""
        self._parent.append(len(self._parent))
        self.names.append(name)
        self.channels.append(channels)
        self.granularity.append(1)
        self.reasons.append("")
        return Part(len(self._parent) - 1, channels)

    def find(self, unit: int) -> int:
        """The unit that stands for the group `unit` belongs to."""
        while self._parent[unit] != unit:
            self._parent[unit] = self._parent[self._parent[unit]]
            unit = self._parent[unit]
        return unit

    def roots(self) -> list[int]:
        """The units that stand for their groups, oldest first."""
        return [unit for unit, parent in enumerate(self._parent) if unit == parent]

    def fix(self, unit: int, reason: str) -> bool:
        """Keeps the unit at full width; the first reason stays. Returns whether it was free before."""
        unit = self.find(unit)
        was_free = not self.reasons[unit]
        self.reasons[unit] = self.reasons[unit] or reason
        return was_free

    def need_multiple(self, unit: int, granularity: int) -> None:
        """Widths of the unit must be multiples of `granularity`, too."""
        unit = self.find(unit)
        self.granularity[unit] = math.lcm(self.granularity[unit], granularity)

    def merge(self, first: int, second: int) -> bool:
        """Makes two units one; their widths stay proportional. Returns False (and changes nothing) if they cannot be.

        A unit of 32 channels that meets one of 64 (after a depthwise multiplier of 2) is counted in 64ths from then on.
        """
        first, second = sorted((self.find(first), self.find(second)))
        if first == second:
            return True
        channels = max(self.channels[first], self.channels[second])
        factors = [channels // self.channels[unit] for unit in (first, second)]
        if any(self.channels[unit] * factor != channels for unit, factor in zip((first, second), factors, strict=True)):
            return False
        self.granularity[first] = math.lcm(self.granularity[first] * factors[0], self.granularity[second] * factors[1])
        self.channels[first] = channels
        self.reasons[first] = self.reasons[first] or self.reasons[second]
        self._parent[second] = first
        return True
