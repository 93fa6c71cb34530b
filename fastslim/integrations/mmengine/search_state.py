"""Where a search loop stands, and what it has found, as files: JSON and YAML, never a pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastslim import errors
from fastslim.files import write_atomically

FORMAT = "fastslim-search-state-1"


def save_state(path: Path | str, kind: str, state: Mapping[str, Any]) -> None:
    """Replaces a search's state; whatever interrupts it, the file is the old or the new one.

    Raises:
        FastslimFileError: the folder or the disk refuses.
    """
    write_atomically(Path(path), json.dumps({"format": FORMAT, "kind": kind, "state": dict(state)}))


def load_state(path: Path | str, kind: str) -> dict[str, Any]:
    """Reads what :func:`save_state` wrote.

    Args:
        path: of the JSON file.
        kind: of the search; another one's state is refused.

    Raises:
        FastslimFileError: a pickle (which is never opened), no file, or one that holds something else.
    """
    path = Path(path)
    if path.suffix in (".pkl", ".pickle", ".pth", ".pt"):
        raise errors.FastslimFileError(
            f"resume_from={os.fspath(path)!r} is a pickle, and no pickle is opened, since it can run code: "
            "a search of fastslim resumes from the .json file in its work_dir; MMRazor's cannot be continued"
        )
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise errors.FastslimFileError(f"resume_from={os.fspath(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise errors.FastslimFileError(f"resume_from={os.fspath(path)!r} is no JSON: {error}") from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT or saved.get("kind") != kind:
        raise errors.FastslimFileError(f"resume_from={os.fspath(path)!r} is not the state of a {kind} search")
    return saved["state"]


def save_subnet(path: Path | str, choices: Mapping[str, int], remarks: str) -> None:
    """Writes a subnet as YAML, ``"unit": width`` a line, as ``channel_cfg`` and ``set_choices`` take it.

    Args:
        path: of the file.
        choices: width by unit name.
        remarks: a comment on its first line.
    """
    # Strings of JSON are strings of YAML; unit names hold characters that YAML alone would need quoted.
    lines = [f"{json.dumps(unit)}: {int(width)}\n" for unit, width in choices.items()]
    write_atomically(Path(path), f"# {remarks}\n{''.join(lines)}")
