"""A search's folder: evaluated.jsonl grows by a line a subnet, state.json is replaced after every decision."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastslim.errors import FastslimFileError, FastslimValueError
from fastslim.files import write_atomically

FORMAT = "fastslim-search-1"


class SearchFolder:
    """Where a search keeps what it has done, so that it can go on after whatever interrupts it.

    Args:
        path: the folder; made by :meth:`enter`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.evaluated = self.path / "evaluated.jsonl"
        self.state = self.path / "state.json"
        self.report = self.path / "report.json"

    def enter(self, identity: Mapping[str, Any], resume: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Opens the folder for a search.

        Args:
            identity: what a search must share with the one in the folder to be its continuation, by name.
            resume: continue what is there; a folder without a search starts a new one.

        Returns:
            The saved states by name of the search (empty for a new one), and the subnets evaluated so far.

        Raises:
            FastslimFileError: the folder cannot be written to, or its files are damaged.
            FastslimValueError: it holds a search, and `resume` is False or it is another one.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for left_over in self.path.glob(".*.tmp"):  # of a process that was killed while it saved
                left_over.unlink()
        except OSError as error:
            raise FastslimFileError(
                f"the folder {self.path} cannot be used ({error.strerror}): choose another"
            ) from error
        if not self.state.exists():
            if self.evaluated.exists():
                raise FastslimFileError(
                    f"{self.path} holds {self.evaluated.name} but no {self.state.name}: choose another folder"
                )
            self.save(identity, {})
            return {}, []
        saved = self._read_state()
        if not resume:
            raise FastslimValueError(
                f"{self.path} holds a search already: continue it with resume=True, or choose another folder"
            )
        for name, mine in identity.items():
            theirs = saved["identity"].get(name)
            if theirs != mine:
                raise FastslimValueError(
                    f"{self.path} holds the search of another {name}: {_short(theirs)} there, {_short(mine)} here. "
                    "Choose another folder, or resume with what the search was started with"
                )
        return saved["searches"], self._read_evaluated()

    def save(self, identity: Mapping[str, Any], searches: Mapping[str, Any]) -> None:
        """Replaces the state of the search; the subnets it builds on are on the disk before it is."""
        if self.evaluated.exists():
            with self.evaluated.open("rb") as stream:
                os.fsync(stream.fileno())
        text = json.dumps({"format": FORMAT, "identity": dict(identity), "searches": dict(searches)})
        write_atomically(self.state, text)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds an evaluated subnet, at once."""
        try:
            with self.evaluated.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
        except OSError as error:
            raise FastslimFileError(f"cannot write {self.evaluated}: {error.strerror or error}") from error

    def _read_state(self) -> dict[str, Any]:
        try:
            saved = json.loads(self.state.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FastslimFileError(f"{self.state} cannot be read ({error}): choose another folder") from error
        if not isinstance(saved, dict) or saved.get("format") != FORMAT or not {"identity", "searches"} <= set(saved):
            raise FastslimFileError(f"{self.state} is not the state of a search: choose another folder")
        return saved

    def _read_evaluated(self) -> list[dict[str, Any]]:
        """All complete lines; one that a kill cut short is removed, or the next one would be glued to it."""
        if not self.evaluated.is_file():
            return []
        text = self.evaluated.read_text(encoding="utf-8", errors="replace")
        records = []
        for line in text.split("\n"):
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and {"subnet", "costs", "score"} <= set(record):
                    records.append(record)
        whole = "".join(json.dumps(record) + "\n" for record in records)
        if whole != text:
            write_atomically(self.evaluated, whole)
        return records


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
