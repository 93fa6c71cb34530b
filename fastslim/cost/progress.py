"""What measuring shows: a bar on a terminal, a line now and then elsewhere, or what the caller wants."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Called with the part that is done, 0 to 1, and with what was timed.
Show = Callable[[float, str], None]
#: Seconds between lines where there is no terminal.
LINE_EVERY = 10.0


@contextmanager
def showing(progress: bool | Show, title: str) -> Iterator[Show]:
    """A function that shows progress.

    Args:
        progress: True for a bar (if rich is installed and the output is a terminal, else lines), False for nothing,
            or a function to call instead.
        title: in front of the bar.
    """
    if not isinstance(progress, bool):
        yield progress
    elif not progress:
        yield lambda done, what: None
    elif sys.stdout.isatty() and importlib.util.find_spec("rich"):
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (TextColumn("[bold]{task.description}[/]"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.fields[what]}", markup=False)) as bar:
            task = bar.add_task(title, total=1.0, what="")
            yield lambda done, what: bar.update(task, completed=done, what=what[:60])
    else:
        shown = time.monotonic()

        def line(done: float, what: str) -> None:
            nonlocal shown
            if time.monotonic() - shown > LINE_EVERY:
                shown = time.monotonic()
                print(f"{title}: {100 * done:.0f} %, last {what[:80]}", flush=True)

        yield line
