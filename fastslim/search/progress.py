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
        self.begun: dict[str, tuple[float, float]] = {}

    def evaluated(self, name: str, done: float, count: int, score: float) -> None:
        """A line, if the last one is a while ago."""
        now = time.monotonic()
        since, done_then = self.begun.setdefault(name, (now, done))
        if now - self.shown > LINE_EVERY:
            self.shown = now
            left = f", about {time_left(now - since, done - done_then, 1 - done)} left" if done > done_then else ""
            self.say(f"{name}: {100 * done:.0f} %, {count} subnets evaluated, last score {score:.4f}{left}")

    def say(self, text: str) -> None:
        """Prints a line."""
        print(text, flush=True)


def time_left(seconds: float, part: float, rest: float) -> str:
    """What the rest takes at the pace so far, in words: ``40 s``, ``3 min``, ``2.5 h``."""
    left = seconds * rest / part
    if left < 100:
        return f"{left:.0f} s"
    return f"{left / 60:.0f} min" if left < 6000 else f"{left / 3600:.1f} h"


class Bar(Silence):
    """How far each search is, with the last score and the time left."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("[bold]{task.description}[/]"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[count]} subnets  score {task.fields[score]:.4f}"),
            TimeRemainingColumn(elapsed_when_finished=True),
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
