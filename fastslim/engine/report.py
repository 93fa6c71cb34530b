"""`make_report`: one page about everything that a run's folder holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fastslim.engine.report_chart import Chart
from fastslim.engine.report_costs import accuracy_chart, search_chart, search_costs
from fastslim.engine.report_curves import latency_chart, loss_chart, pace_charts, progress_chart, retraining_chart
from fastslim.engine.report_page import page
from fastslim.engine.report_parts import RunParts, read_parts
from fastslim.engine.report_png import plot_chart
from fastslim.engine.report_provenance import provenance
from fastslim.engine.report_search import search_section, width_columns
from fastslim.engine.report_sections import (
    accuracy_section,
    export_section,
    headline,
    latency_section,
    training_section,
)
from fastslim.engine.report_widths import plot_channels
from fastslim.engine.report_words import COUNTED
from fastslim.errors import FastslimFileError, FastslimRuntimeError
from fastslim.files import write_atomically

PAGE, PICTURES, WIDTHS = "report.html", "report", "widths"

#: Of all charts there may be.
NAMES = (
    "accuracy_multiply_adds", "accuracy_parameters", "search_multiply_adds", "search_parameters",
    "search_activation_memory", "search_latency", "losses", "accuracy_epochs", "learning_rate", "speed", "retraining",
    "latency",
)  # fmt: skip


def make_report(run: Path | str) -> Path:
    """Writes ``report.html`` into a run's folder, and its pictures as PNG files into the folder ``report`` beside it.

    The page shows whatever is there: training, search, retrained subnets, exported files, a check of latencies; of
    each part that is missing it says how to make it. It needs no other file and no network. Pictures are left out
    where matplotlib is not installed.

    Args:
        run: the run's folder.

    Returns:
        The page's path.

    Raises:
        FastslimFileError: there is no such folder, it holds nothing of a run, a file in it is damaged (nothing is
            written then), or the disk refuses.
    """
    parts = read_parts(run)
    text = compose(parts)  # all that can be wrong with a file is found out before anything is written
    drawn = draw_pictures(parts)
    write_atomically(parts.path / PAGE, text)
    remove_others(parts.path / PICTURES, drawn)
    return parts.path / PAGE


def compose(parts: RunParts) -> str:
    """The page's text."""
    name = parts.path.resolve().name
    title = f"{parts.model} on {parts.data}" if parts.config else name
    lead = f"Run {name}: one network that was trained to run at many widths."
    sections = (
        accuracy_section(parts),
        search_section(parts),
        training_section(parts),
        latency_section(parts),
        export_section(parts),
    )
    return page(title, lead, headline(parts), sections, provenance(parts))


def draw_pictures(parts: RunParts) -> list[Path]:
    """The pictures as PNG files; none where matplotlib is not installed."""
    folder = parts.path / PICTURES
    pictures: dict[str, Callable[[Path], None]] = {
        chart.name: partial(plot_chart, chart=chart) for chart in charts(parts)
    }
    full, columns = width_columns(parts)
    if columns:
        pictures[WIDTHS] = partial(plot_channels, full=full, columns=columns)
    drawn: list[Path] = []
    if not pictures:
        return drawn
    try:
        folder.mkdir(exist_ok=True)
        for name, draw in pictures.items():
            draw(folder / f"{name}.png")
            drawn.append(folder / f"{name}.png")
    except OSError as error:
        if isinstance(error, FastslimFileError):
            raise
        raise FastslimFileError(f"cannot write {folder}: {error.strerror or error}") from error
    except FastslimRuntimeError:  # no matplotlib
        with contextlib.suppress(OSError):
            folder.rmdir()
        return []
    return drawn


def remove_others(folder: Path, drawn: list[Path]) -> None:
    """Removes pictures of an earlier report that this one does not have, and no other files."""
    for name in (*NAMES, WIDTHS):
        file = folder / f"{name}.png"
        if file not in drawn:
            file.unlink(missing_ok=True)


def charts(parts: RunParts) -> list[Chart]:
    """All charts that a run has."""
    drawn = [
        *(accuracy_chart(parts, cost) for cost in COUNTED),
        *(search_chart(parts, cost) for cost in search_costs(parts)),
        loss_chart(parts),
        progress_chart(parts),
        *pace_charts(parts),
        retraining_chart(parts),
        latency_chart(parts),
    ]
    return [chart for chart in drawn if chart]
