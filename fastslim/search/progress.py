"""What a search shows: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import importlib.util
import sys
import time
from typing import Any

#: Seconds between lines where there is no terminal.
LINE_EVERY = 10.0


class Silence:
    """Shows nothing."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the display."""

    def evaluated(self, name: str, done: float, count: int, score: float) -> None:
        """Shows an evaluated subnet.

        Args:
            name: of the search.
            done: part of it that is done, 0 to 1.
            count: subnets evaluated so far.
            score: of this one.
        """

    def say(self, text: str) -> None:
        """Shows a line."""


class Lines(Silence):
    """A line every ten seconds, and those that are worth one."""

    def __init__(self) -> None:
        self.shown = time.monotonic()

    def evaluated(self, name: str, done: float, count: int, score: float) -> None:
        """A line, if the last one is a while ago."""
        if time.monotonic() - self.shown > LINE_EVERY:
            self.shown = time.monotonic()
            self.say(f"{name}: {100 * done:.0f} %, {count} subnets evaluated, last score {score:.4f}")

    def say(self, text: str) -> None:
        """Prints a line."""
        print(text, flush=True)


class Bar(Silence):
    """How far each search is, with the last score."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self.bar = Progress(
            TextColumn("[bold]{task.description}[/]"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[count]} subnets  score {task.fields[score]:.4f}"),
            TimeElapsedColumn(),
        )
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> Bar:
        self.bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Leaves the last state on the screen."""
        self.bar.__exit__(*error)

    def evaluated(self, name: str, done: float, count: int, score: float) -> None:
        """Moves the bar."""
        if name not in self.tasks:
            self.tasks[name] = self.bar.add_task(name, total=1.0, count=0, score=score)
        self.bar.update(self.tasks[name], completed=done, count=count, score=score)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


def make_progress(wanted: bool) -> Silence:
    """A bar, if rich is installed and the output is a terminal; else lines; nothing, unless wanted."""
    if not wanted:
        return Silence()
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        return Bar()
    return Lines()
