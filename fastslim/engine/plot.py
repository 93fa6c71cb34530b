"""Pictures of a run: accuracy against cost with each width labelled, and training curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastslim.engine.evaluate import WidthResult, format_count
from fastslim.errors import FastslimRuntimeError
from fastslim.files import replace_file

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
SUPERNET, ALONE = "#2563eb", "#f59e0b"
DPI = 150
LETTERS_AN_INCH = 12  # of 10 points, from the left side of the axes to that of the figure


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes, drawn without a display; a list of axes, side by side, where there are several.

    Raises:
        FastslimRuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FastslimRuntimeError("pictures need matplotlib: pip install 'fastslim[cli]'") from error
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in panels:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(GRID)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=MUTED, length=0, labelsize=10)
    return figure, panels if columns > 1 else panels[0]


def set_titles(axes: Any, claim: str, detail: str) -> None:
    """The claim in large letters, what it was measured on below."""
    axes.set_title(f"{claim}\n", loc="left", fontsize=14, fontweight="bold", color=INK, pad=4)
    room = int(LETTERS_AN_INCH * axes.figure.get_figwidth())
    below = axes.annotate(
        detail if len(detail) <= room else f"{detail[: room - 1]}…",
        (0, 1), xytext=(0, 8), xycoords="axes fraction", textcoords="offset points", fontsize=10, color=MUTED,
    )  # fmt: skip
    below.set_in_layout(False)  # long names would leave no room for the axes


def save_figure(figure: Any, path: Path) -> None:
    """Writes a PNG; an older picture stays until the new one is complete."""
    replace_file(path, lambda stream: figure.savefig(stream, format="png", facecolor="white"))


def plot_widths(
    path: Path, results: Sequence[WidthResult], *, data: str, model: str, alone: Sequence[WidthResult] = ()
) -> None:
    """Accuracy against multiply-adds, one labelled point a width.

    Args:
        path: of the PNG.
        results: the supernet's widths.
        data: name of the data, for the caption.
        model: name of the network, for the caption.
        alone: the same subnets trained alone, drawn beside them.

    Raises:
        FastslimRuntimeError: matplotlib is not installed.
    """
    figure, axes = new_figure(8, 5)
    rows = sorted(results, key=lambda row: row.width)
    full, narrow = rows[-1], rows[0]
    axes.plot(
        [row.multiply_adds for row in rows],
        [100 * row.accuracy for row in rows],
        color=SUPERNET, marker="o", markersize=9, linewidth=2, label="one supernet, trained once", zorder=3,
    )  # fmt: skip
    if alone:
        axes.scatter(
            [row.multiply_adds for row in alone],
            [100 * row.accuracy for row in alone],
            color=ALONE, marker="D", s=52, edgecolors="white", label="each width trained alone", zorder=4,
        )  # fmt: skip
        axes.legend(frameon=False, loc="lower right", fontsize=10, labelcolor=INK)
    beaten = {
        other.width for other in alone for row in rows if other.width == row.width and other.accuracy > row.accuracy
    }
    for row in rows:
        below = row.width in beaten  # the label keeps clear of the point above it
        axes.annotate(
            f"{row.width:.2f}×\n{100 * row.accuracy:.1f} %",
            (row.multiply_adds, 100 * row.accuracy),
            xytext=(0, -12 if below else 12), textcoords="offset points", ha="center", va="top" if below else "bottom",
            fontsize=10, color=INK, fontweight="bold", zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )  # fmt: skip
    set_cost_axis(axes, rows)
    lowest, highest = (pick(100 * row.accuracy for row in (*rows, *alone)) for pick in (min, max))
    margin = max(2.0, highest - lowest)
    axes.set_ylim(lowest - 0.35 * margin, highest + 0.35 * margin)
    set_percent_axis(axes)
    share = 100 * narrow.multiply_adds / max(full.multiply_adds, 1)
    claim = f"One network, {len(rows)} widths: {100 * narrow.accuracy:.1f} % with {share:.0f} % of the work"
    set_titles(axes, claim, f"{model} on {data}, full width {100 * full.accuracy:.1f} %; BN statistics calibrated")
    save_figure(figure, path)


def set_cost_axis(axes: Any, rows: Sequence[WidthResult]) -> None:
    """A logarithmic axis with one tick a width."""
    costs = [max(row.multiply_adds, 1) for row in rows]
    axes.set_xscale("log")
    axes.set_xticks(costs, [format_count(cost) for cost in costs])
    axes.set_xticks([], minor=True)
    axes.set_xlim(costs[0] / 1.35, costs[-1] * 1.35)
    axes.set_xlabel("multiply-adds an image (log scale)", fontsize=11, color=MUTED)


def set_percent_axis(axes: Any) -> None:
    """Ticks up to 100 %, though labels may need room above."""
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= min(high, 100)])
    axes.set_ylabel("held-out accuracy, %", fontsize=11, color=MUTED)


def plot_curves(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Held-out accuracy of each width over the epochs.

    Args:
        path: of the PNG.
        records: of metrics.jsonl; those of evaluations are drawn.

    Raises:
        FastslimRuntimeError: matplotlib is not installed.
    """
    from matplotlib import colormaps

    figure, axes = new_figure(8, 5)
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    widths = [row["width"] for row in evaluations[-1]["widths"]] if evaluations else []
    epochs = [record["epoch"] for record in evaluations]
    ends = []
    for index, width in enumerate(widths):
        curve = [100 * record["widths"][index]["accuracy"] for record in evaluations]
        color = colormaps["viridis"](0.85 - 0.8 * index / max(1, len(widths) - 1))
        axes.plot(epochs, curve, color=color, linewidth=2, marker="o", markersize=4)
        ends.append((curve[-1], f"{width:.2f}×  {curve[-1]:.1f} %", color))
    if ends:
        label_ends(axes, epochs[-1], ends)
    axes.set_xlabel("epoch", fontsize=11, color=MUTED)
    set_percent_axis(axes)
    set_titles(axes, "All widths learn together", "evaluated with calibrated BN statistics")
    save_figure(figure, path)


def label_ends(axes: Any, epoch: int, ends: list[tuple[float, str, Any]]) -> None:
    """Labels at the right end of curves, pushed apart where they would overlap."""
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top + 0.08 * (top - bottom))
    gap = (top - bottom) * 0.06
    height = float("-inf")
    for value, text, color in sorted(ends, key=lambda end: end[0]):
        height = max(value, height + gap)
        axes.annotate(
            text, (epoch, value), xytext=(1.02, height), textcoords=("axes fraction", "data"),
            color=color, fontsize=10, fontweight="bold", va="center", annotation_clip=False,
        )  # fmt: skip
