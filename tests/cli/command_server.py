"""Runs fastslim commands in processes of their own that start at once: torch is imported before they are forked.

As a program: reads the words of a command as a line of JSON, answers with the process's number, and once it has
ended with its exit status (negative: the signal).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType


class CommandServer:
    """Such a program, and how to use it.

    Args:
        folder: the current one of all commands; their output goes to output.txt in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> CommandServer:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()

    def run(
        self, words: list[str], *, signal: int = 0, after: float = 0.0, when: Callable[[], bool] = lambda: True
    ) -> tuple[int, float]:
        """Runs a command.

        Args:
            words: of the command.
            signal: is sent to it; 0: none.
            after: so many seconds.
            when: and once this is so.

        Returns:
            The exit status, and the seconds it took.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        number = int(self.process.stdout.readline())
        started = time.monotonic()
        if signal:
            time.sleep(after)
            while not when() and time.monotonic() < started + 100:
                time.sleep(0.002)
            with contextlib.suppress(ProcessLookupError):  # it was faster
                os.kill(number, signal)
        answered = self.process.stdout.readline()
        return int(answered), time.monotonic() - started

    def output(self) -> str:
        """What all commands have printed."""
        return (self.folder / "output.txt").read_text()


def serve() -> None:
    """Answers commands until the input ends."""
    import torch

    import fastslim.engine.export_run
    import fastslim.engine.retrain
    from fastslim.cli.commands import fastslim

    torch.set_num_threads(1)
    for line in sys.stdin:
        number = os.fork()
        if not number:
            output = os.open("output.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
            os.dup2(output, 1)
            os.dup2(output, 2)
            # A shell's background jobs ignore Ctrl-C, and so would everything that they start.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                fastslim(json.loads(line), prog_name="fastslim")
            except SystemExit as end:
                os._exit(int(end.code or 0))
            os._exit(0)
        print(number, flush=True)
        _, status = os.waitpid(number, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
