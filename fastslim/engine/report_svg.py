"""A chart as SVG: sizes in pixels, colours from the page's style, so that it follows light and dark."""

from __future__ import annotations

from fastslim.engine.report_chart import Chart, Series
from fastslim.engine.report_layout import (
    HALF,
    LETTER,
    Frame,
    Label,
    corners,
    end_labels,
    frame_of,
    marker_size,
    places,
    point_labels,
)
from fastslim.engine.report_markup import Markup, element, join


def draw(chart: Chart, width: int, height: int) -> Markup:
    """The picture of a chart, for a page this wide.

    Args:
        chart: what to show.
        width, height: in pixels; the browser scales it where it has less or more room.
    """
    frame = _frame(chart, width, height)
    drawn = [_series(series, frame) for series in chart.series]
    labels = [_label(label, "start") for label in end_labels(chart, frame)]
    labels += [_label(label, "middle") for label in point_labels(chart, frame)]
    return element(
        "svg",
        *_axes(chart, frame, width, height),
        *drawn,
        *labels,
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=f"{chart.title}. {chart.detail}",
    )


def _frame(chart: Chart, width: int, height: int) -> Frame:
    ticks = chart.y.ticks(*chart.ends()[1], 6)
    left = 14 + max((LETTER * len(chart.y.show(tick)) for tick in ticks), default=0)
    right = width - max((10 + LETTER * len(series.end) for series in chart.series if series.end), default=12)
    return frame_of(chart, left, 26.0, right, height - 44.0)


def _axes(chart: Chart, frame: Frame, width: int, height: int) -> list[Markup]:
    (x_low, x_high), (y_low, y_high) = chart.ends()
    parts = [element("text", chart.y.label, x=0, y=12, class_="axis")]
    for tick in chart.y.ticks(y_low, y_high, 6):
        y = frame.y(tick)
        parts.append(element("line", x1=frame.left, x2=frame.right, y1=y, y2=y, class_="grid"))
        parts.append(element("text", chart.y.show(tick), x=frame.left - 7, y=y + 4, class_="tick", text_anchor="end"))
    most = max(2, int((frame.right - frame.left) / 62))
    for tick in chart.x.ticks(x_low, x_high, most):
        x = frame.x(tick)
        parts.append(element("line", x1=x, x2=x, y1=frame.bottom, y2=frame.bottom + 4, class_="base"))
        parts.append(element("text", chart.x.show(tick), x=x, y=frame.bottom + 18, class_="tick", text_anchor="middle"))
    parts.append(element("line", x1=frame.left, x2=frame.right, y1=frame.bottom, y2=frame.bottom, class_="base"))
    parts.append(element("text", chart.x.label, x=frame.right, y=height - 6, class_="axis", text_anchor="end"))
    return parts


def _label(label: Label, anchor: str) -> Markup:
    return element("text", label.text, x=label.x, y=label.y, text_anchor=anchor, class_=f"label t-{label.color}")


def _series(series: Series, frame: Frame) -> Markup:
    points = [point for point in series.points if point.drawable]
    spots = places(series, frame)
    parts: list[Markup] = []
    if spots and (series.line == "step" or (series.line != "none" and len(spots) > 1)):
        parts.append(element("path", d=_path(corners(series, frame)), class_=f"line {series.line}"))
    if series.marker == "dot":  # thousands of points are one path, or the page would grow by a hundred bytes each
        parts.append(element("path", d="".join(f"M{x:.1f} {y:.1f}h0" for x, y in spots), class_="dots"))
    else:
        for point, (x, y) in zip(points, spots, strict=True):
            if point.base is not None:
                parts.append(element("line", x1=x, x2=x, y1=frame.y(point.base), y2=y, class_="stem"))
            if size := marker_size(series):
                parts.append(marker(series.marker, x, y, size * HALF, point.tip or f"{series.name} {point.label}"))
    return element("g", *parts, class_=f"c-{series.color}")


def _path(turns: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in turns)


def marker(kind: str, x: float, y: float, half: float = HALF, tip: str = "") -> Markup:
    """One marker, with what it says when it is pointed at."""
    wide = 1.25 * half
    shapes = {
        "diamond": [(0, -wide), (wide, 0), (0, wide), (-wide, 0)],
        "square": [(-half, -half), (half, -half), (half, half), (-half, half)],
        "triangle": [(0, -wide), (wide, half), (-wide, half)],
    }
    title = element("title", tip) if tip else None
    if kind not in shapes:
        return element("circle", title, cx=x, cy=y, r=half, class_="marker", data_tip=tip or None)
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in shapes[kind])
    return element("polygon", title, points=points, class_="marker", data_tip=tip or None)


def legend(chart: Chart) -> Markup | None:
    """Names of the series; None where their ends say them."""
    named = [series for series in chart.series if series.name and not series.end]
    if not named:
        return None
    return element("ul", *(element("li", swatch(series), series.name) for series in named), class_="legend")


def swatch(series: Series) -> Markup:
    """A small sample of how a series is drawn."""
    line = series.line != "none"
    parts = [
        element("path", d="M1 7H23", class_=f"line {series.line}") if line else None,
        element("path", d="M12 7h0", class_="dots") if series.marker == "dot" else None,
        marker(series.marker, 12.0, 7.0, 4.0) if series.marker not in ("none", "dot") else None,
    ]
    return element("svg", join(*parts), viewBox="0 0 24 14", class_=f"swatch c-{series.color}", aria_hidden="true")
