"""Times of a step between the widths at which it was measured: bilinear in the channels it writes and reads."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from fastslim.graph.steps import ForwardSteps, Step, specs_in
from fastslim.graph.units import DimSpec
from fastslim.mutators import ChannelMutator

#: Evenly spaced ratios per axis, from rough to fine.
LEVELS = (2, 3, 5, 9)
Point = tuple[float, float]
# Units by number, and how many entries of a dimension each channel of theirs is (relative to the others).
Axis = tuple[tuple[int, float], ...]


@dataclass
class StepGrid:
    """Steps that always take the same time as each other, and where it is known.

    Attributes:
        step: one of them.
        count: how many there are.
        out_axis: the units whose channels it writes.
        in_axis: the other units whose channels it reads.
        seconds: measured, by the entries along the two axes.
        complete: levels of the grid that are measured.
    """

    step: Step
    out_axis: Axis
    in_axis: Axis
    count: int = 1
    seconds: dict[Point, float] = field(default_factory=dict)
    complete: int = 0
    _lines: tuple[list[float], list[float]] = ([], [])

    def point(self, widths: Sequence[int]) -> Point:
        """Where a subnet lies."""
        x = sum([widths[unit] * entries for unit, entries in self.out_axis])
        return x, sum([widths[unit] * entries for unit, entries in self.in_axis])

    def samples(self, mutator: ChannelMutator, level: int) -> Iterator[list[int]]:
        """Widths of all units for each point of a level."""
        units = mutator.units
        full = [unit.num_channels for unit in units]
        ratios = (_ratios(mutator, self.out_axis, LEVELS[level]), _ratios(mutator, self.in_axis, LEVELS[level]))
        for out_ratio, in_ratio in product(*ratios):
            widths = list(full)
            for axis, ratio in ((self.out_axis, out_ratio), (self.in_axis, in_ratio)):
                for number, _ in axis:
                    widths[number] = units[number].nearest_width(ratio)
            yield widths

    def forget(self) -> None:
        """As if nothing were measured."""
        self.seconds, self.complete, self._lines = {}, 0, ([], [])

    def finish_level(self, times: Mapping[Point, float | None]) -> bool:
        """Takes the times at all points of the next level, if they are all known; says whether they are."""
        known = {point: seconds for point, seconds in times.items() if seconds is not None}
        if len(known) < len(times):
            return False
        self.seconds.update(known)
        self._lines = (sorted({x for x, _ in known}), sorted({y for _, y in known}))
        self.complete += 1
        return True

    def estimate(self, widths: Sequence[int]) -> float:
        """Seconds of all `count` steps at these widths."""
        x, y = self.point(widths)
        own = self.seconds.get((x, y))
        if own is not None:
            return self.count * own
        (left, right, across), (low, high, up) = _between(self._lines[0], x), _between(self._lines[1], y)
        seconds = self.seconds
        bottom = seconds[left, low] + across * (seconds[right, low] - seconds[left, low])
        top = seconds[left, high] + across * (seconds[right, high] - seconds[left, high]) if up else 0.0
        return self.count * (bottom + up * (top - bottom))


def _between(line: Sequence[float], value: float) -> tuple[float, float, float]:
    """The neighbours of a value on a line, and how far it is from the first to the second."""
    place = bisect_right(line, value)
    if place == 0:
        return line[0], line[0], 0.0
    if place == len(line):
        return line[-1], line[-1], 0.0
    low, high = line[place - 1], line[place]
    return low, high, (value - low) / (high - low)


def _ratios(mutator: ChannelMutator, axis: Axis, points: int) -> list[float]:
    if not axis:
        return [1.0]
    numbers = {number for number, _ in axis}
    units = [unit for number, unit in enumerate(mutator.units) if number in numbers]
    low = min(unit.candidate_widths[0] / unit.num_channels for unit in units)
    return [low + (1 - low) * i / (points - 1) for i in range(points)]


def step_grids(mutator: ChannelMutator, signature: Mapping[int, tuple[str, str]]) -> list[StepGrid]:
    """The steps of a supernet, equal ones together.

    Args:
        mutator: of the supernet.
        signature: of each step, by number, at the smallest and at the largest widths.
    """
    forward: ForwardSteps = mutator.trace.forward
    channels = {number: unit.num_channels for number, unit in enumerate(mutator.units) if unit.is_mutable}
    grids: dict[object, StepGrid] = {}
    for number, step in enumerate(forward.steps):
        made = [forward.activations[index] for index in (step.makes or step.reads)]
        read = list(specs_in([*step.args, *(value for _, value in step.kwargs)]))
        layer = mutator.trace.layers.get(step.module)
        inner = () if layer is None else (layer.heads, layer.key, layer.value)
        out = _entries([dim for spec in made for dim in spec.dims], channels)
        inside = _entries([*(dim for spec in read for dim in spec.dims), *inner], channels)
        axes = (_axis(out), _axis({unit: entries for unit, entries in inside.items() if unit not in out}))
        if not axes[0]:
            axes = (axes[1], ())
        key = (axes, signature[number])
        if key in grids:
            grids[key].count += 1
        else:
            grids[key] = StepGrid(step, *axes)
    return list(grids.values())


def _entries(dims: Sequence[DimSpec], channels: Mapping[int, int]) -> dict[int, float]:
    """Entries of a dimension per channel, for each unit that changes; of the dimension that has most of them."""
    result: dict[int, float] = {}
    for dim in dims:
        own: dict[int, float] = {}
        for unit, size in dim:
            if unit in channels:
                own[unit] = own.get(unit, 0) + size / channels[unit]
        result.update({unit: max(entries, result.get(unit, 0)) for unit, entries in own.items()})
    return result


def _axis(entries: Mapping[int, float]) -> Axis:
    least = min(entries.values(), default=1.0)
    return tuple((unit, value / least) for unit, value in sorted(entries.items()))
