"""The charts of a report as PNG files, for talks and papers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastslim.engine.plot import INK, MUTED, new_figure, save_figure, set_titles
from fastslim.engine.report_chart import PALETTE, Chart, Series
from fastslim.engine.report_layout import corners, frame_of, marker_size, point_labels

MARKERS = {"none": None, "dot": "o", "circle": "o", "diamond": "D", "square": "s", "triangle": "^"}
WIDTH, HEIGHT = 640.0, 350.0  # px, of a frame in which the page's letters are as large as those of 9 points here


def plot_chart(path: Path, chart: Chart) -> None:
    """Draws a chart.

    Raises:
        FastslimRuntimeError: matplotlib is not installed.
    """
    figure, axes = new_figure(8, 5)
    x_ends, y_ends = chart.ends()
    axes.set_xscale("log" if chart.x.log else "linear")
    axes.set_yscale("log" if chart.y.log else "linear")
    frame = frame_of(chart, 0.0, 0.0, WIDTH, HEIGHT)
    for series in chart.series:
        _draw(axes, series, [(x / WIDTH, 1 - y / HEIGHT) for x, y in corners(series, frame)])
    axes.set_xlim(*x_ends)
    axes.set_ylim(*y_ends)
    _set_ticks(axes.set_xticks, chart.x.ticks(*x_ends, 8), chart.x.show)
    _set_ticks(axes.set_yticks, chart.y.ticks(*y_ends, 8), chart.y.show)
    axes.set_xlabel(chart.x.label, fontsize=11, color=MUTED)
    axes.set_ylabel(chart.y.label, fontsize=11, color=MUTED)
    for label in point_labels(chart, frame):
        axes.text(
            label.x / WIDTH, 1 - label.y / HEIGHT, label.text, transform=axes.transAxes, ha="center", va="baseline",
            fontsize=9, fontweight="bold", color=PALETTE[label.color][0], zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
        )  # fmt: skip
    if any(series.name for series in chart.series):
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="best")
    set_titles(axes, chart.title, chart.detail)
    save_figure(figure, path)


def _set_ticks(set_ticks: Any, ticks: list[float], show: Any) -> None:
    set_ticks(ticks, [show(tick) for tick in ticks])
    set_ticks([], minor=True)


def _draw(axes: Any, series: Series, turns: list[tuple[float, float]]) -> None:
    """Lines by their corners, which are parts of the frame's width and height; markers by values."""
    points = [point for point in series.points if point.drawable]
    color, dot = PALETTE[series.color][0], series.marker == "dot"
    look: dict[str, Any] = {
        "color": color, "linestyle": "none" if series.line == "none" else "--" if series.line == "dashed" else "-",
        "linewidth": 1.5 if series.line == "step" else 2, "marker": MARKERS[series.marker],
        "markersize": 3 if dot else 7 * marker_size(series), "markeredgecolor": color if dot else "white",
        "alpha": 0.6 if dot else 1,
        "label": series.end or series.name or None, "zorder": 2 if dot else 3,
    }  # fmt: skip
    if series.line == "step":
        axes.plot([x for x, _ in turns], [y for _, y in turns], transform=axes.transAxes, **look)
    else:
        axes.plot([point.x for point in points], [point.y for point in points], **look)
    for point in points:
        if point.base is not None:
            axes.plot([point.x] * 2, [point.base, point.y], color=color, linewidth=1.5, alpha=0.7, zorder=2)
