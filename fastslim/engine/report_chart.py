"""What a chart shows, before anything is drawn: axes, ticks and series of points."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from fastslim.engine.evaluate import format_count

# Okabe and Ito's colours, safe for colour-blind eyes; in the dark their lighter members.
PALETTE = {
    "blue": ("#0072b2", "#56b4e9"),
    "orange": ("#d55e00", "#f0a040"),
    "green": ("#008060", "#3fd0a4"),
    "purple": ("#a8507f", "#e79ac4"),
    "grey": ("#868e9b", "#6d7685"),
    "ink": ("#1f2430", "#e8eaf0"),
    # About viridis, from the narrowest to the full width, which has the most contrast; all have 3 to their card.
    "ramp0": ("#2ca66b", "#3a76a0"),
    "ramp1": ("#1f9e89", "#26828e"),
    "ramp2": ("#26828e", "#1f9e89"),
    "ramp3": ("#31688e", "#35b779"),
    "ramp4": ("#3e4989", "#6ece58"),
    "ramp5": ("#440154", "#d8e219"),
}
RAMP = 6


def ramp(index: int, count: int) -> str:
    """The name of a colour for the index-th of several widths."""
    return f"ramp{round(index * (RAMP - 1) / max(count - 1, 1)) if count > 1 else RAMP - 1}"


@dataclass(frozen=True)
class Point:
    """A point; its label is drawn beside it where there is room, its tip shown on demand.

    Attributes:
        x, y: place.
        label: a few characters.
        tip: a sentence.
        base: a thin line leads from this height to the point.
    """

    x: float
    y: float
    label: str = ""
    tip: str = ""
    base: float | None = None

    @property
    def drawable(self) -> bool:
        """Whether it has a place on paper."""
        return math.isfinite(self.x) and math.isfinite(self.y)


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        name: for the legend.
        points: in the order a line connects them.
        color: a name of `PALETTE`.
        line: how they are connected; "step" keeps the height until the next point.
        marker: how each is drawn.
        end: a label at the right end of the line.
    """

    name: str
    points: tuple[Point, ...]
    color: str
    line: Literal["none", "straight", "dashed", "step"] = "none"
    marker: Literal["none", "dot", "circle", "diamond", "square", "triangle"] = "none"
    end: str = ""


@dataclass(frozen=True)
class Axis:
    """One direction of a chart.

    Attributes:
        label: what is shown, with its unit.
        show: the text of a tick.
        log: whether equal factors have equal lengths.
        limit: no tick is above it.
        zero: the axis begins at 0.
        whole: only whole numbers have ticks.
    """

    label: str
    show: Callable[[float], str] = "{:g}".format
    log: bool = False
    limit: float = math.inf
    zero: bool = False
    whole: bool = False

    def spread(self, values: Iterable[float], margin: float) -> tuple[float, float]:
        """The ends of the axis: those of the values, and a margin of a part of their distance."""
        given = [self.along(value) for value in values]
        low, high = min(given, default=0.0), max(given, default=1.0)
        if self.zero:
            low, margin_below = 0.0, 0.0
        else:
            margin_below = margin
        distance = high - low or (0.1 if self.log else max(0.1 * abs(high), 0.1))
        return self.back(low - margin_below * distance), self.back(high + margin * distance)

    def along(self, value: float) -> float:
        """How far a value lies along the axis."""
        return math.log10(max(value, 1e-12)) if self.log else value

    def back(self, place: float) -> float:
        """The value at a place."""
        return 10**place if self.log else place

    def ticks(self, low: float, high: float, most: int) -> list[float]:
        """Round values between the ends, at most so many."""
        if self.log:
            for digits in ((1, 2, 5), (1, 3), (1,)):
                found = [tick for tick in _decades(low, high, digits) if tick <= self.limit]
                if 2 <= len(found) <= most:
                    return found
        return [tick for tick in _steps(low, min(high, self.limit), most) if not self.whole or tick == int(tick)]


def _decades(low: float, high: float, digits: tuple[int, ...]) -> Iterator[float]:
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for digit in digits:
            if low <= digit * 10.0**power <= high:
                yield digit * 10.0**power


def _steps(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    power = math.floor(math.log10((high - low) / most))
    for step in (digit * 10.0**exponent for exponent in range(power, power + 3) for digit in (1, 2, 5)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return [round(number * step, 12) for number in range(first, last + 1)]
    return [low]


@dataclass(frozen=True)
class Chart:
    """Everything a picture shows.

    Attributes:
        name: of its file.
        title: what it shows, in a few words.
        detail: what it was measured on.
        x, y: axes.
        series: from the bottom to the top.
    """

    name: str
    title: str
    detail: str
    x: Axis
    y: Axis
    series: tuple[Series, ...] = field(default=())

    def points(self) -> list[Point]:
        """All that have a place on paper."""
        return [point for series in self.series for point in series.points if point.drawable]

    def ends(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Lowest and highest value of both axes."""
        points = self.points()
        heights = [point.y for point in points] + [point.base for point in points if point.base is not None]
        return self.x.spread((point.x for point in points), 0.06), self.y.spread(heights, 0.12)


def count(number: float) -> str:
    """As tables of a run show a count: 1 234 567 is 1.23 M."""
    return f"{number / 1e12:.3g} T" if number >= 999.5e9 else format_count(number)


def count_tick(number: float) -> str:
    """A round count: 1 500 000 is 1.5 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9999 * size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


def percent(share: float, digits: int = 1) -> str:
    """A share of 1 in per cent."""
    return f"{100 * share:.{digits}f} %" if math.isfinite(share) else "not a number"
