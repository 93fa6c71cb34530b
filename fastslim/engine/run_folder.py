"""A run's folder: config.yaml, metrics.jsonl, last.pt, best.pt, results.json, report.png, curves.png."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from fastslim.engine.config import TrainConfig
from fastslim.engine.options import differences
from fastslim.errors import FastslimError, FastslimFileError, FastslimValueError
from fastslim.files import write_atomically


class RunFolder:
    """Paths of a run, and the rules for entering one that was used before.

    Args:
        path: the folder; it is created when training starts.
        kind: of the options that are saved in it.
        named_by: the flag that chooses the folder, for messages.
    """

    def __init__(self, path: Path | str, kind: type[TrainConfig] = TrainConfig, named_by: str = "--run") -> None:
        self.path = Path(path)
        self.kind, self.named_by = kind, named_by
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.last = self.path / "last.pt"
        self.best = self.path / "best.pt"
        self.results = self.path / "results.json"
        self.report = self.path / "report.png"
        self.curves = self.path / "curves.png"
        self.tensorboard = self.path / "tensorboard"

    def prepare(self) -> None:
        """Creates the folder and proves that files can be written, before any time is spent on training.

        Raises:
            FastslimFileError: the folder cannot be created or written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            remove_left_overs(self.path)
            probe = self.path / ".writable.tmp"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise FastslimFileError(
                f"the run folder {self.path} cannot be written to ({error.strerror or error}): "
                f"choose another {self.named_by}"
            ) from error

    def remove_if_empty(self) -> None:
        """Takes back `prepare` where nothing came of the run."""
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def saved_config(self) -> TrainConfig | None:
        """The configuration the folder was used with, or None where there is none.

        Raises:
            FastslimFileError: the folder holds a config.yaml of some other program.
        """
        if not self.config.is_file():
            return None
        try:
            return self.kind.from_file(self.config)
        except FastslimError as error:
            raise FastslimFileError(
                f"{self.path} is not a folder of fastslim's ({error}): choose another {self.named_by}"
            ) from error

    def finished_results(self) -> dict[str, Any] | None:
        """What a finished run ended with, or None."""
        if not self.results.is_file():
            return None
        try:
            results = json.loads(self.results.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FastslimFileError(f"{self.results} is damaged ({error}): retrain with --overwrite") from error
        return results if isinstance(results, dict) and results.get("finished") else None

    def clear(self) -> None:
        """Removes the files of an earlier run, and no others."""
        for file in (self.results, self.last, self.best, self.metrics, self.config, self.report, self.curves):
            file.unlink(missing_ok=True)
        for picture in [self.path / "report.html", *(self.path / "report").glob("*.png")]:
            picture.unlink(missing_ok=True)
        for events in self.tensorboard.glob("events.out.tfevents.*"):
            events.unlink()

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl."""
        try:
            with self.metrics.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
        except OSError as error:
            raise FastslimFileError(f"cannot write {self.metrics}: {error.strerror or error}") from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete lines of metrics.jsonl; one that a kill cut short is left out."""
        if not self.metrics.is_file():
            return []
        records = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        return records

    def truncate_metrics(self, step: int) -> None:
        """Drops what was recorded after ``step``, so that a resumed run writes each record once."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        write_atomically(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))


def remove_left_overs(folder: Path) -> None:
    """Removes temporary files and folders of processes that were killed while they saved."""
    for left_over in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        if left_over.is_dir():
            shutil.rmtree(left_over)
        else:
            left_over.unlink()


def existing_run(run: Path | str) -> RunFolder:
    """The folder of a run.

    Raises:
        FastslimFileError: there is none.
    """
    folder = RunFolder(run)
    if not folder.path.is_dir():
        raise FastslimFileError(f"there is no run folder {folder.path}: `fastslim train --run {folder.path}` makes one")
    return folder


def check_entry(folder: RunFolder, config: TrainConfig, resume: bool) -> None:
    """Refuses to mix two runs in one folder.

    Raises:
        FastslimValueError: an unfinished or different run is in the folder, or nothing is there to resume.
    """
    saved = folder.saved_config()
    changed = differences(saved, config) if saved else []
    if resume:
        if saved is None:  # killed before its first checkpoint, a run has its options at least
            raise FastslimValueError(f"{folder.path} holds no checkpoint to resume from: train without --resume")
        if changed:
            raise FastslimValueError(
                f"{folder.path} was trained with other options ({'; '.join(changed[:3])}): "
                f"resume without them, or start anew in another {folder.named_by}"
            )
    elif changed and (folder.last.is_file() or folder.results.is_file()):
        raise FastslimValueError(
            f"{folder.path} holds a run with other options ({'; '.join(changed[:3])}): "
            f"choose another {folder.named_by}, or replace it with --overwrite"
        )
    elif folder.last.is_file():
        raise FastslimValueError(
            f"{folder.path} holds an unfinished run: continue it with --resume, or replace it with --overwrite"
        )
