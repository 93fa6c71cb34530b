"""Labels of a picture: inside it, clear of markers and of each other; lines and their corners."""

from __future__ import annotations

import itertools
import random
from typing import Literal

import pytest

from fastslim.engine.report_chart import Axis, Chart, Point, Series
from fastslim.engine.report_layout import (
    HALF,
    LETTER,
    LINE,
    corners,
    end_labels,
    frame_of,
    marker_size,
    places,
    point_labels,
)


def crowded(seed: int, count: int = 14) -> Chart:
    """Two series with labelled points close to each other."""
    draw = random.Random(seed)
    series = tuple(
        Series(
            name, tuple(Point(draw.random(), draw.random(), f"{name}-{i}") for i in range(count)), "blue", line, mark
        )
        for name, line, mark in (("uniform", "straight", "circle"), ("found", "none", "diamond"))
    )
    return Chart("c", "title", "detail", Axis("x"), Axis("y"), series)


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@pytest.mark.parametrize("seed", range(5))
def test_labels_keep_clear_of_markers_and_of_each_other(seed: int) -> None:
    chart = crowded(seed)
    frame = frame_of(chart, 40, 26, 500, 290)
    boxes = []
    for label in point_labels(chart, frame):
        half = LETTER * len(label.text) / 2
        boxes.append((label.x - half, label.y - LINE + 4, label.x + half, label.y + 2))
        assert label.x - half >= 40 and label.x + half <= 510 and label.y <= 290
    assert len(boxes) > 8
    assert not any(overlap(a, b) for a, b in itertools.combinations(boxes, 2))
    spots = [place for series in chart.series for place in places(series, frame)]
    markers = [(x - HALF, y - HALF, x + HALF, y + HALF) for x, y in spots]
    assert not any(overlap(box, marker) for box in boxes for marker in markers)


def test_a_label_prefers_a_place_beside_the_line() -> None:
    points = (Point(0, 0), Point(1, 1, "middle"), Point(2, 2))
    chart = Chart("c", "t", "d", Axis("x"), Axis("y"), (Series("s", points, "blue", "straight", "circle"),))
    frame = frame_of(chart, 0, 0, 100, 100)
    (label,) = point_labels(chart, frame)
    half = LETTER * len("middle") / 2
    box = (label.x - half, label.y - LINE + 4, label.x + half, label.y + 2)
    (x, y), (to_x, to_y) = corners(chart.series[0], frame)[::2]
    on_line = [(x + t * (to_x - x) / 50, y + t * (to_y - y) / 50) for t in range(51)]
    assert not any(box[0] < x < box[2] and box[1] < y < box[3] for x, y in on_line)


@pytest.mark.parametrize("heights", [[0.9, 0.901, 0.902, 0.903], [0.1] * 6, [0.0, 0.5, 1.0], [1.0] * 10])
def test_labels_at_line_ends_do_not_overlap_and_stay_in_the_picture(heights: list[float]) -> None:
    series = tuple(
        Series(f"s{i}", (Point(0, 0), Point(1, height)), "blue", "straight", end=f"label {i}")
        for i, height in enumerate(heights)
    )
    chart = Chart("c", "t", "d", Axis("x"), Axis("y"), series)
    labels = end_labels(chart, frame_of(chart, 40, 26, 400, 290))
    assert len(labels) == len(heights)
    places = sorted(label.y for label in labels)
    assert all(b - a >= LINE - 1e-9 for a, b in itertools.pairwise(places))
    assert places[0] >= 12 and places[-1] <= 294


def test_a_line_of_steps_turns_at_each_point_and_goes_on_to_the_end() -> None:
    series = Series("front", (Point(1, 1), Point(2, 3)), "grey", "step")
    chart = Chart("c", "t", "d", Axis("x"), Axis("y"), (series,))
    frame = frame_of(chart, 0, 0, 100, 100)
    first, second = places(series, frame)
    assert corners(series, frame) == [first, (second[0], first[1]), second, (100, second[1])]


@pytest.mark.parametrize(
    ("count", "line", "size"), [(5, "straight", 1.0), (20, "straight", 0.7), (300, "straight", 0.0), (300, "none", 1.0)]
)
def test_lines_through_many_points_need_no_markers(count: int, line: Literal["straight", "none"], size: float) -> None:
    series = Series("s", tuple(Point(i, i) for i in range(count)), "blue", line, "circle")
    assert marker_size(series) == size
