"""Pictures: what they say, checked on the drawn objects; an interrupted drawing keeps the old picture."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastslim.engine import plot
from fastslim.engine.evaluate import WidthResult

ROWS = [
    WidthResult(0.25, 138_000, 44_500, 0.957, 0.1),
    WidthResult(0.5, 546_000, 176_000, 0.981, 0.1),
    WidthResult(1.0, 2_170_000, 701_000, 0.989, 0.1),
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Axes of the figures made in a test."""
    axes: list[Any] = []
    original = plot.new_figure

    def new_figure(width: float, height: float) -> tuple[Any, Any]:
        figure, own = original(width, height)
        axes.append(own)
        return figure, own

    monkeypatch.setattr(plot, "new_figure", new_figure)
    return axes


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_report_shows_every_width_and_makes_its_claim(tmp_path: Path, drawn: list[Any]) -> None:
    plot.plot_widths(tmp_path / "report.png", ROWS, data="digits", model="resnet18")
    axes = drawn[0]
    assert list(axes.lines[0].get_xdata()) == [138_000, 546_000, 2_170_000]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([95.7, 98.1, 98.9])
    assert {"0.25×\n95.7 %", "0.50×\n98.1 %", "1.00×\n98.9 %"} <= set(texts(axes))
    assert axes.get_title(loc="left").strip() == "One network, 3 widths: 95.7 % with 6 % of the work"
    with Image.open(tmp_path / "report.png") as image:
        assert image.format == "PNG" and image.width > 1000
        assert len(set(image.convert("L").tobytes())) > 50


def test_subnets_trained_alone_are_drawn_beside(tmp_path: Path, drawn: list[Any]) -> None:
    alone = [WidthResult(0.25, 138_000, 44_500, 0.962, 0.1), WidthResult(1.0, 2_170_000, 701_000, 0.98, 0.1)]
    plot.plot_widths(tmp_path / "report.png", ROWS, data="digits", model="resnet18", alone=alone)
    points = drawn[0].collections[0].get_offsets()
    assert points[:, 0].tolist() == [138_000, 2_170_000]
    assert points[:, 1].tolist() == pytest.approx([96.2, 98.0])
    labels = {text.get_text().split("\n")[0]: text.xyann[1] for text in drawn[0].texts if "×" in text.get_text()}
    assert labels["0.25×"] < 0 < labels["1.00×"]  # a label gives way to a better point above it


def test_curves_end_in_labels_that_do_not_overlap(tmp_path: Path, drawn: list[Any]) -> None:
    records = [
        {"kind": "evaluation", "epoch": epoch, "step": epoch, "widths": [row.as_dict() for row in rows]}
        for epoch, rows in ((1, ROWS), (2, [WidthResult(r.width, 1, 1, 0.98 + r.width / 1e4, 0) for r in ROWS]))
    ]
    plot.plot_curves(tmp_path / "curves.png", [{"kind": "epoch", "epoch": 1, "step": 1}, *records])
    axes = drawn[0]
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 2]] * 3
    heights = sorted(text.xyann[1] for text in axes.texts if "×" in text.get_text())
    low, high = axes.get_ylim()
    assert all(b - a > 0.04 * (high - low) for a, b in itertools.pairwise(heights))


def test_no_tick_is_above_all_images(tmp_path: Path, drawn: list[Any]) -> None:
    rows = [WidthResult(0.5, 1000, 10, 0.999, 0.1), WidthResult(1.0, 4000, 40, 1.0, 0.1)]
    plot.plot_widths(tmp_path / "report.png", rows, data="digits", model="resnet18")
    assert 99 < max(drawn[0].get_yticks()) <= 100
    assert drawn[0].get_ylim()[1] > 100


def test_single_width_and_no_evaluation_are_drawn_too(tmp_path: Path) -> None:
    plot.plot_widths(tmp_path / "report.png", ROWS[-1:], data="digits", model="resnet18")
    plot.plot_curves(tmp_path / "curves.png", [])
    assert {path.name for path in tmp_path.iterdir()} == {"report.png", "curves.png"}


def test_failed_drawing_keeps_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    path = tmp_path / "report.png"
    path.write_bytes(b"old picture")

    def savefig(self: Figure, stream: Any, **_: object) -> None:
        stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(KeyboardInterrupt):
        plot.plot_widths(path, ROWS, data="digits", model="resnet18")
    assert path.read_bytes() == b"old picture"
    assert list(tmp_path.iterdir()) == [path]


def test_long_names_leave_room_for_the_axes(tmp_path: Path, drawn: list[Any], recwarn: pytest.WarningsRecorder) -> None:
    plot.plot_widths(tmp_path / "report.png", ROWS, data="module:" + "load" * 60, model="module:" + "build" * 60)
    assert not [warning for warning in recwarn if "constrained_layout" in str(warning.message)]
    assert max(len(text) for text in texts(drawn[0])) == 96
    assert drawn[0].get_position().width > 0.7
