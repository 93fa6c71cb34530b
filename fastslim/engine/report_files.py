"""JSON of a run folder, read so that a wrong or missing value is named together with its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastslim.errors import FastslimFileError

ADVICE = "make the file again, or move it away and the report leaves its part out"


class Entry:
    """A value of a file.

    Args:
        value: as JSON gave it.
        file: where it stands.
        place: in the file, such as ``widths[2].accuracy``.
    """

    def __init__(self, value: Any, file: Path, place: str = "") -> None:
        self.value, self.file, self.place = value, file, place

    def wrong(self, expected: str) -> FastslimFileError:
        """The error that this is something else than expected."""
        got = repr(self.value)
        got = got if len(got) <= 60 else f"{got[:57]}..."
        return FastslimFileError(
            f"{self.file} is damaged: {self.place or 'it'} should be {expected}, not {got}; {ADVICE}"
        )

    def maybe(self, key: str) -> Entry | None:
        """The entry of an object, or None where there is none or it is null."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        if self.value.get(key) is None:
            return None
        return Entry(self.value[key], self.file, f"{self.place}.{key}".lstrip("."))

    def __getitem__(self, key: str) -> Entry:
        found = self.maybe(key)
        if found is None:
            raise FastslimFileError(f"{self.file} is damaged: {self.place or 'it'} has no {key!r}; {ADVICE}")
        return found

    def items(self) -> list[Entry]:
        """The entries of a list."""
        if not isinstance(self.value, list):
            raise self.wrong("a list")
        return [Entry(value, self.file, f"{self.place}[{index}]") for index, value in enumerate(self.value)]

    def pairs(self) -> dict[str, Entry]:
        """The entries of an object by name."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        return {
            str(key): Entry(value, self.file, f"{self.place}.{key}".lstrip(".")) for key, value in self.value.items()
        }

    def number(self) -> float:
        """A number; it may be infinite or none at all (NaN), as a loss may."""
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            raise self.wrong("a number")
        return self.value

    def count(self) -> int:
        """A whole number that is not negative."""
        if isinstance(self.value, bool) or not isinstance(self.value, int) or self.value < 0:
            raise self.wrong("a whole number, 0 or more")
        return self.value

    def text(self) -> str:
        """A string."""
        if not isinstance(self.value, str):
            raise self.wrong("a text")
        return self.value


def read_json(file: Path) -> Entry:
    """A file's value.

    Raises:
        FastslimFileError: it cannot be read, or is not JSON.
    """
    try:
        return Entry(json.loads(file.read_text(encoding="utf-8")), file)
    except OSError as error:
        raise FastslimFileError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FastslimFileError(f"{file} is damaged, it is not JSON ({error}); {ADVICE}") from error


def read_lines(file: Path) -> list[Entry]:
    """The values of a file with one a line; a last line that a kill cut short is left out.

    Raises:
        FastslimFileError: it cannot be read, or another line is not JSON.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FastslimFileError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    *whole, last = text.split("\n")
    entries = []
    for number, line in enumerate([*whole, last], 1):
        try:
            if line.strip():
                entries.append(Entry(json.loads(line), file, f"line {number}"))
        except (ValueError, RecursionError) as error:
            if number > len(whole):
                break
            raise FastslimFileError(f"{file} is damaged, its line {number} is not JSON ({error}); {ADVICE}") from error
    return entries
