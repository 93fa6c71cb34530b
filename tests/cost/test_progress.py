"""What measuring shows on a terminal, elsewhere, and to a caller of its own."""

from __future__ import annotations

import io
import sys

import pytest

from fastslim.cost import progress
from fastslim.cost.progress import LINE_EVERY, showing


def test_nothing_is_shown_unless_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with showing(False, "measuring") as show:
        show(0.5, "conv")
    assert capsys.readouterr() == ("", "")


def test_lines_now_and_then_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with showing(True, "measuring") as show:
        for second in range(25):
            now = float(second)
            show(second / 25, f"conv {second}")
    first = int(LINE_EVERY) + 1
    assert capsys.readouterr().out.splitlines() == [
        f"measuring: {100 * second / 25:.0f} %, last conv {second}" for second in (first, 2 * first)
    ]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with showing(True, "measuring") as show:
        show(0.5, "conv [3x3]")
        show(1.0, "conv [5x5]")
    assert "measuring" in terminal.getvalue() and "conv [5x5]" in terminal.getvalue()


def test_a_function_of_the_caller_is_called() -> None:
    shown = []
    with showing(lambda done, what: shown.append((done, what)), "measuring") as show:
        show(0.25, "conv")
    assert shown == [(0.25, "conv")]
