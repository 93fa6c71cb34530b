"""Which part of its channels every unit keeps, for each found subnet: as a picture of bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastslim.engine.plot import GRID, INK, MUTED, new_figure, save_figure, set_titles
from fastslim.engine.report_chart import PALETTE
from fastslim.engine.report_markup import Markup, element
from fastslim.engine.report_page import caption

COLORS = ("orange", "purple")
TITLE = "Widths that the search chose"
DETAIL = "Channels each unit keeps, of those it has"


@dataclass(frozen=True)
class Column:
    """A subnet in the picture.

    Attributes:
        title: what it was searched for.
        detail: its cost and score.
        widths: by unit.
        color: 0 for the first search, 1 for the second and so on.
    """

    title: str
    detail: str
    widths: dict[str, int]
    color: int = 0


def short_name(unit: str) -> str:
    """``layer1.0.conv1_(0, 16)_16`` without what the picture shows anyhow."""
    return unit.rsplit("_(", 1)[0] if "_(" in unit else unit


def short_names(units: Sequence[str]) -> list[str]:
    """Short names, without the modules that all units are in, where they tell units apart; else whole ones."""
    short = [short_name(unit) for unit in units]
    paths = [name.split(".") for name in short]
    shared = min((len(path) for path in paths), default=1) - 1
    while shared > 0 and any(path[:shared] != paths[0][:shared] for path in paths):
        shared -= 1
    if len(units) > 1:
        short = [".".join(path[shared:]) for path in paths]
    return [name if short.count(name) == 1 else unit for name, unit in zip(short, units, strict=True)]


def widths_figure(full: dict[str, int], columns: Sequence[Column]) -> Markup:
    """The bars of all units and subnets.

    Args:
        full: all channels, by unit, in the order of the network.
        columns: the subnets.
    """
    cells = [element("div", element("span", "unit"), element("span", "channels"), class_="head unit")]
    for column in columns:
        cells.append(element("div", column.title, element("span", column.detail), class_="head"))
    for unit, name in zip(full, short_names(list(full)), strict=True):
        cells.append(
            element("div", element("span", name), element("span", f"of {full[unit]}"), class_="unit", title=unit)
        )
        for column in columns:
            cells.append(_bar(name, column.widths.get(unit), full[unit], COLORS[column.color % len(COLORS)]))
    grid = element("div", *cells, class_="widths", style=f"--columns:{len(columns)}")
    return element("figure", caption(TITLE, DETAIL), element("div", grid, class_="bars"))


def _bar(name: str, width: int | None, channels: int, color: str) -> Markup:
    if width is None:
        return element("div", "–")
    share = 100 * width / max(channels, 1)
    tip = f"{name}: {width} of {channels} channels ({share:.0f} %)"
    return element(
        "div", element("i", style=f"width:{min(share, 100):.1f}%"), element("b", width), class_=f"bar c-{color}",
        data_tip=tip,
    )  # fmt: skip


def plot_channels(path: Path, full: dict[str, int], columns: Sequence[Column]) -> None:
    """The same picture as a PNG.

    Raises:
        FastslimRuntimeError: matplotlib is not installed.
    """
    names = short_names(list(full))
    figure, axes = new_figure(2.4 + 1.5 * max(len(columns), 2), 1.6 + 0.27 * len(names))
    figure.get_layout_engine().set(w_pad=0.15)  # names reach to the side
    pitch = 1.12
    for index, column in enumerate(columns):
        left = index * pitch
        shares = [column.widths.get(unit, 0) / max(channels, 1) for unit, channels in full.items()]
        rows = range(len(names))
        axes.barh(rows, [1] * len(names), left=left, height=0.74, color=GRID)
        color = PALETTE[COLORS[column.color % len(COLORS)]][0]
        axes.barh(rows, shares, left=left, height=0.74, color=color, alpha=0.45)
        for row, (unit, channels) in enumerate(full.items()):
            axes.text(
                left + 0.03, row, f"{column.widths.get(unit, '–')} of {channels}", va="center", fontsize=8, color=INK
            )
        axes.text(left, -0.75, f"{column.title}\n{column.detail}", fontsize=8, color=INK, va="bottom")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_ylim(len(names) - 0.5, -2.4)
    axes.set_xlim(-0.02, max(len(columns), 2) * pitch)
    axes.tick_params(colors=MUTED)
    set_titles(axes, TITLE, DETAIL)
    save_figure(figure, path)
