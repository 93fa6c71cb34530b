"""Where things lie in a picture: the frame of a chart, the corners of lines, labels that keep clear of all else."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fastslim.engine.report_chart import Chart, Series

LETTER, LINE = 7.4, 15.0  # px, of 12 px bold letters in wide fonts such as DejaVu and Verdana
HALF = 4.5  # px, half a marker
SEVERAL, MANY = 12, 40  # points of a line beyond which it has small markers, or none
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Frame:
    """The rectangle inside the axes, and where values lie in it."""

    left: float
    top: float
    right: float
    bottom: float
    x: Callable[[float], float]
    y: Callable[[float], float]


@dataclass(frozen=True)
class Label:
    """A text in its place: the middle of its lower edge, or its left end."""

    text: str
    x: float
    y: float
    color: str


def frame_of(chart: Chart, left: float, top: float, right: float, bottom: float) -> Frame:
    """The frame between these sides."""
    (x_low, x_high), (y_low, y_high) = chart.ends()

    def place(along: Callable[[float], float], low: float, high: float, start: float, end: float) -> Callable:
        first, last = along(low), along(high)
        return lambda value: start + (along(value) - first) / (last - first) * (end - start)

    return Frame(
        left, top, right, bottom,
        place(chart.x.along, x_low, x_high, left, right),
        place(chart.y.along, y_low, y_high, bottom, top),
    )  # fmt: skip


def end_labels(chart: Chart, frame: Frame) -> list[Label]:
    """Labels at the right ends of lines, pushed apart where they would overlap."""
    ends = [(_places[-1][1], series) for series in chart.series if series.end and (_places := places(series, frame))]
    ends.sort(key=lambda end: -end[0])
    heights: list[float] = []
    for y, _ in ends:
        heights.append(min(y, heights[-1] - LINE) if heights else y)
    lowest = frame.top - LINE  # of the topmost label; those below it make room
    for index in reversed(range(len(heights))):
        heights[index] = max(heights[index], lowest)
        lowest = heights[index] + LINE
    return [
        Label(series.end, frame.right + 8, height + 4, series.color)
        for height, (_, series) in zip(heights, ends, strict=True)
    ]


def point_labels(chart: Chart, frame: Frame) -> list[Label]:
    """Labels that keep clear of markers and of each other, and of lines if they can; without room there is none."""
    drawn = [series for series in chart.series if series.marker not in ("none", "dot")]
    taken = [_around(place, HALF) for series in drawn for place in places(series, frame)]
    lined = [corners(series, frame) for series in chart.series if series.line != "none"]
    lines = [_around(place, 1) for turns in lined for place in _along(turns)]
    found = []
    for series in reversed(chart.series):
        for point in series.points:
            if point.label and point.drawable:
                boxes = list(_boxes(frame.x(point.x), frame.y(point.y), LETTER * len(point.label), frame))
                free = [box for box in boxes if not any(_overlap(box, other) for other in taken)]
                clear = [box for box in free if not any(_overlap(box, other) for other in lines)]
                for box in (clear or free)[:1]:
                    taken.append(box)
                    found.append(Label(point.label, (box[0] + box[2]) / 2, box[3] - 2, series.color))
    return found


def marker_size(series: Series) -> float:
    """How large the markers of a series are, 1 being usual; 0 where a line through so many points needs none."""
    if series.marker == "none" or (series.line != "none" and len(series.points) > MANY):
        return 0.0
    return 0.7 if series.line != "none" and len(series.points) > SEVERAL else 1.0


def places(series: Series, frame: Frame) -> list[tuple[float, float]]:
    """Where the points of a series are."""
    return [(frame.x(point.x), frame.y(point.y)) for point in series.points if point.drawable]


def corners(series: Series, frame: Frame) -> list[tuple[float, float]]:
    """Where a line turns; one of steps goes on to the end, as no cheaper point is better there."""
    points = places(series, frame)
    if series.line != "step":
        return points
    turns = [corner for (_, y), (x, to_y) in itertools.pairwise(points) for corner in ((x, y), (x, to_y))]
    return [*points[:1], *turns, *((frame.right, y) for _, y in points[-1:])]


def _along(turns: list[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Places every few pixels on a straight line through these."""
    for (x, y), (to_x, to_y) in itertools.pairwise(turns):
        count = max(1, int(math.hypot(to_x - x, to_y - y) / 6))
        for step in range(count):
            yield x + (to_x - x) * step / count, y + (to_y - y) * step / count


def _boxes(x: float, y: float, wide: float, frame: Frame) -> Iterator[Box]:
    """Where a label may be, the best place first."""
    gap, high = HALF + 4, LINE - 2
    for left, top in (
        (x - wide / 2, y - gap - high + 1),
        (x - wide / 2, y + gap - 2),
        (x + gap, y - high / 2),
        (x - gap - wide, y - high / 2),
        (x + gap - 3, y - gap - high + 4),
        (x - gap - wide + 3, y - gap - high + 4),
        (x + gap - 3, y + gap - 4),
        (x - gap - wide + 3, y + gap - 4),
    ):
        if left >= frame.left and left + wide <= frame.right + 10 and top >= 14 and top + high <= frame.bottom:
            yield left, top, left + wide, top + high


def _around(place: tuple[float, float], half: float) -> Box:
    return place[0] - half, place[1] - half, place[0] + half, place[1] + half


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
