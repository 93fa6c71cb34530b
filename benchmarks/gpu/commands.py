"""Commands with a time limit, whose output is shown, logged and, if they fail, kept in the result file."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import NamedTuple

import results
from results import ROOT, Stage

LOG_LINES = 60


class Done(NamedTuple):
    """What a command left: its exit status (None: it ran out of time) and the end of its output."""

    code: int | None
    tail: str


class Context:
    """What all stages share.

    Args:
        result: path of the result file.
        dry: rehearse on a machine without a GPU.
        record: let the kernels stage write the dispatch table.
    """

    def __init__(self, result: Path, dry: bool, record: bool) -> None:
        self.result, self.dry, self.record = result, dry, record
        self.deadline = 0.0
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self.environment["PYTHONPATH"] = self.environment["PYTHONPATH"].rstrip(os.pathsep)
        self.environment["FASTSLIM_COMMIT"] = results.commit()

    def run(self, *command: str | Path, **variables: str) -> Done:
        """Runs a command within the stage's time, its output printed and logged."""
        words = [str(word) for word in command]
        print("$", *(f"{key}={value}" for key, value in variables.items()), *words, flush=True)
        log = self.result.with_suffix(".log")
        environment = {**self.environment, **variables}
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, text=True, errors="replace", start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        lines: list[str] = []

        def read() -> None:
            with log.open("a") as file:
                print("$", *words, file=file)
                for line in process.stdout or ():
                    print(line, end="", flush=True)
                    file.write(line)
                    file.flush()
                    lines.append(line)
                    del lines[:-LOG_LINES]

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            code: int | None = process.wait(max(1.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # workers it may have left, too
            process.wait()
        reader.join(5)
        return Done(code, "".join(lines))


def outcome(stage: Stage, done: Done) -> str:
    """The status of a stage after its last command; keeps the output of one that failed."""
    if done.code == 0:
        return "ok"
    stage.content["log"] = done.tail
    stage.result.save()
    return "out of time" if done.code is None else f"failed (exit status {done.code})"
