"""Files that are either the old or the new one, never half of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from fastslim.errors import FastslimFileError


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a temporary file beside ``path``, forces it to disk and renames it.

    Whatever interrupts it (Ctrl-C, a full disk, a kill), ``path`` holds the complete old or the complete new content.

    Raises:
        FastslimFileError: the folder or the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise FastslimFileError(f"cannot write {path}: {error.strerror or error}") from error
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """`replace_file` for text in UTF-8."""
    replace_file(path, lambda stream: stream.write(text.encode()))


def sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, where the system allows to sync a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
