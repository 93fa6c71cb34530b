"""Which channels belong together: consecutive parts of units, and the table that merges and splits the units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fastslim.graph.report import Finding


class NotUnderstoodError(Exception):
    """A rule cannot follow the channels; its message is the reason in the report."""


@dataclass(frozen=True)
class Part:
    """Consecutive entries of a dimension that belong to one unit (None: always present).

    Of a part with ``channels`` entries the first ``channels * width // unit.channels`` are active.

    Attributes:
        unit: number in the table.
        channels: entries at full width.
        counted: the entries lie behind a channel shuffle, where channels are counted and not tracked.
    """

    unit: int | None
    channels: int
    counted: bool = False


Parts = tuple[Part, ...]


def total(parts: Parts) -> int:
    """Entries at full width."""
    return sum(part.channels for part in parts)


def scaled(parts: Parts, factor: int) -> Parts:
    """The parts after every entry has become `factor` consecutive ones."""
    return tuple(Part(part.unit, part.channels * factor, part.counted) for part in parts)


@dataclass
class _Unit:
    channels: int
    granularity: int = 1
    #: (module, first channel, last + 1, channels of the module) of the layer that produces the channels first; None
    #: when none does: parameters that follow what they meet.
    producer: tuple[str, int, int, int] | None = None
    #: Position of the producer among all; units without one come last.
    order: int = 1 << 60
    finding: Finding | None = None
    counted: bool = False
    parent: int | None = None
    #: Blocks the unit was split into, with their channels at that time.
    children: list[tuple[int, int]] = field(default_factory=list)


class UnitTable:
    """Union-find over units, in which a unit may also be split into consecutive blocks."""

    def __init__(self) -> None:
        self._units: list[_Unit] = []
        self._made = 0

    def new(self, channels: int, producer: str | None = None) -> Part:
        """A unit of its own; `producer` names the layer that makes the channels."""
        self._units.append(_Unit(channels))
        part = Part(len(self._units) - 1, channels)
        if producer is not None:
            self.set_producer((part,), producer)
        return part

    def set_producer(self, parts: Parts, name: str) -> None:
        """The layer `name` makes these channels, where no other is known to."""
        parts = self.resolve(parts)
        start, whole = 0, total(parts)
        for part in parts:
            if part.unit is not None and (unit := self._units[part.unit]).producer is None:
                unit.producer = (name, start, start + part.channels, whole)
                unit.order = self._made
            start += part.channels
        self._made += 1

    def __getitem__(self, unit: int) -> _Unit:
        return self._units[self.find(unit)]

    def find(self, unit: int) -> int:
        """The unit that stands for the group `unit` belongs to (it may be split)."""
        while (parent := self._units[unit].parent) is not None:
            if (above := self._units[parent].parent) is not None:
                self._units[unit].parent = above
            unit = parent
        return unit

    def roots(self) -> list[int]:
        """The units that stand for their groups and are not split, in the order of their producers."""
        found = [i for i, unit in enumerate(self._units) if unit.parent is None and not unit.children]
        return sorted(found, key=lambda i: (self._units[i].order, i))

    def resolve(self, parts: Iterable[Part]) -> Parts:
        """The parts in terms of the units that stand for their groups; split ones block by block."""
        result: list[Part] = []
        for part in parts:
            if part.unit is None:
                result.append(part)
                continue
            root = self.find(part.unit)
            unit = self._units[root]
            if unit.children:
                whole = sum(share for _, share in unit.children)
                result.extend(
                    self.resolve(
                        Part(child, part.channels * share // whole, part.counted) for child, share in unit.children
                    )
                )
            else:
                result.append(Part(root, part.channels, part.counted))
        return tuple(result)

    def fix(self, parts: Iterable[Part], finding: Finding) -> bool:
        """Keeps the units of these parts at full width; the first reason stays. Returns whether any was free."""
        changed = False
        for part in self.resolve(parts):
            if part.unit is not None and self._units[part.unit].finding is None:
                self._units[part.unit].finding = finding
                changed = True
        return changed

    def count_only(self, parts: Parts) -> None:
        """From here on the channels are counted: a narrow network takes as many, not the same ones."""
        for part in self.resolve(parts):
            if part.unit is not None:
                self[part.unit].counted = True

    def is_produced(self, parts: Parts) -> bool:
        """Whether a layer is known to produce some of these channels."""
        return any(part.unit is not None and self[part.unit].producer is not None for part in self.resolve(parts))

    def is_free(self, part: Part) -> bool:
        """Whether the part's unit may change its width, as far as is known."""
        return part.unit is not None and self[part.unit].finding is None

    def need_multiple(self, unit: int, granularity: int) -> None:
        """Widths of the unit must be multiples of `granularity`, too."""
        record = self[unit]
        together = math.lcm(record.granularity, granularity)
        if record.channels % together:
            raise NotUnderstoodError(f"needs widths in multiples of {granularity}, which {record.channels} is not")
        record.granularity = together

    def can_divide(self, parts: Parts, divisor: int) -> bool:
        """Whether units keep a choice of widths when every `divisor` consecutive entries stay together."""
        for part in self.resolve(parts):
            if part.unit is not None:
                unit = self[part.unit]
                if math.lcm(unit.granularity, self._step(part, divisor)) >= unit.channels > unit.granularity:
                    return False
        return True

    def _step(self, part: Part, divisor: int) -> int:
        """What the unit's width must be a multiple of, for the part to hold a multiple of `divisor`."""
        whole = divisor * self[part.unit].channels
        return whole // math.gcd(whole, part.channels)

    def divided(self, parts: Parts, divisor: int) -> Parts:
        """The parts after every `divisor` consecutive entries have become one.

        Raises:
            NotUnderstoodError: when a part does not hold a whole number of them.
        """
        if divisor == 1:
            return parts
        result = []
        for part in self.resolve(parts):
            if part.channels % divisor:
                raise NotUnderstoodError(f"takes {divisor} channels together across the border of two parts")
            if part.unit is not None:
                self.need_multiple(part.unit, self._step(part, divisor))
            result.append(Part(part.unit, part.channels // divisor, part.counted))
        return tuple(result)

    def cut(self, parts: Parts, offsets: Sequence[int]) -> list[Parts]:
        """The pieces between ascending offsets; units are split where an offset falls inside one.

        Raises:
            NotUnderstoodError: when a unit cannot be split there.
        """
        pieces: list[Parts] = []
        rest = self.resolve(parts)
        start = 0
        for offset in (*offsets, None):
            piece: list[Part] = []
            while rest and (offset is None or start < offset):
                first = rest[0]
                if offset is not None and start + first.channels > offset:
                    head = offset - start
                    if first.unit is None or first.counted:
                        sizes = (head, first.channels - head)
                        for size in sizes if first.unit is not None else ():
                            channels = self[first.unit].channels
                            self.need_multiple(first.unit, channels // math.gcd(channels, size))
                        rest = (*(Part(first.unit, size, first.counted) for size in sizes), *rest[1:])
                    else:
                        self._split(first, head)
                        rest = self.resolve(rest)
                        piece = list(self.resolve(piece))
                    continue
                piece.append(first)
                start += first.channels
                rest = rest[1:]
            pieces.append(tuple(piece))
        return [self.resolve(piece) for piece in pieces]

    def _split(self, part: Part, head: int) -> None:
        assert part.unit is not None
        root = self.find(part.unit)
        unit = self._units[root]
        if head * unit.channels % part.channels:
            raise NotUnderstoodError("cuts in the middle of a channel")
        first = head * unit.channels // part.channels
        if first % unit.granularity or (unit.channels - first) % unit.granularity:
            raise NotUnderstoodError(f"cuts channels that must stay in groups of {unit.granularity}")
        start = 0
        for size in (first, unit.channels - first):
            producer = None
            if unit.producer is not None:
                name, begin, end, whole = unit.producer
                own = [begin + (end - begin) * offset // unit.channels for offset in (start, start + size)]
                producer = (name, own[0], own[1], whole)
            self._units.append(_Unit(size, unit.granularity, producer, unit.order, unit.finding, unit.counted))
            unit.children.append((len(self._units) - 1, size))
            start += size

    def tie(self, one: Parts, other: Parts, finding: Finding) -> Parts:
        """Makes two descriptions of the same entries change together; returns what both now are.

        Units are merged, and split where the borders of the other description lie.

        Raises:
            NotUnderstoodError: when that is impossible.
        """
        for _ in range(64):
            one, other = self.resolve(one), self.resolve(other)
            position = next(
                (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a.channels != b.channels), None
            )
            for a, b in list(zip(one, other, strict=False))[:position]:
                self._unify(a, b, finding)
            if position is None:
                if len(one) != len(other):
                    raise NotUnderstoodError("combines tensors of different channel counts")
                return self.resolve(one)
            one, other = self.resolve(one), self.resolve(other)
            ends_one, ends_other = _ends(one), _ends(other)
            if ends_one[-1] != ends_other[-1]:
                raise NotUnderstoodError("combines tensors of different channel counts")
            one = sum(self.cut(one, sorted(set(ends_other) - set(ends_one))), ())
            other = sum(self.cut(other, sorted(set(ends_one) - set(ends_other))), ())
        raise NotUnderstoodError("combines channels with themselves at another place")

    def _unify(self, a: Part, b: Part, finding: Finding) -> None:
        if a.unit is None or b.unit is None:
            free = a if b.unit is None else b
            if free.unit is not None:
                self.fix((free,), finding)
            return
        # Parts were resolved before earlier ones of the same lists were unified.
        (a,), (b,) = self.resolve((a,)), self.resolve((b,))
        if a.unit != b.unit:
            self._merge(a, b)

    def _merge(self, a: Part, b: Part) -> None:
        one, other = self._units[a.unit], self._units[b.unit]
        channels = math.lcm(one.channels, other.channels)
        granularity = math.lcm(
            one.granularity * (channels // one.channels), other.granularity * (channels // other.channels)
        )
        if channels > 1 << 20 or channels % granularity:
            raise NotUnderstoodError("combines channel counts that do not go together")
        keep, drop = (a, b) if _rank(one) <= _rank(other) else (b, a)
        kept, dropped = self._units[keep.unit], self._units[drop.unit]
        kept.channels, kept.granularity = channels, granularity
        kept.finding = kept.finding or dropped.finding
        kept.counted = kept.counted or dropped.counted
        dropped.parent = keep.unit


def _rank(unit: _Unit) -> tuple[bool, int]:
    return unit.producer is None, unit.order


def _ends(parts: Parts) -> list[int]:
    ends, end = [], 0
    for part in parts:
        end += part.channels
        ends.append(end)
    return ends
