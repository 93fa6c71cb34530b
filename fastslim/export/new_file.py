"""Outputs that appear whole or not at all, and never in the place of something else unasked."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastslim.errors import FastslimFileError, FastslimValueError


@contextlib.contextmanager
def new_file(path: Path | str, suffix: str, overwrite: bool) -> Iterator[Path]:
    """A place to write a file, which is moved to ``path`` when the block ends well.

    Whatever interrupts it, ``path`` is what it was before or the complete new file.

    Args:
        path: of the file; missing folders are made.
        suffix: its ending.
        overwrite: replace a file that is there.

    Raises:
        FastslimFileError: something is there already, or the disk refuses.
        FastslimValueError: another ending.
    """
    path = Path(path)
    if path.suffix != suffix:
        raise FastslimValueError(f"the file's name must end in {suffix}, got {path.name!r}")
    if path.is_dir():
        raise FastslimFileError(f"{path} is a folder: choose the name of a file")
    refuse_existing(path, overwrite)
    with _beside(path) as folder:
        # Under its own name: some formats write it into the file.
        yield folder / path.name
        with _named(path):
            _sync(folder / path.name)
            os.replace(folder / path.name, path)
            _sync(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which is moved to ``path`` when the block ends well; nothing may be there yet.

    Raises:
        FastslimFileError: the disk refuses.
    """
    with _beside(path) as folder:
        inside = folder / path.name
        with _named(path):
            inside.mkdir()
        yield inside
        with _named(path):
            for file in inside.iterdir():
                _sync(file)
            os.rename(inside, path)
            _sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Writes text in UTF-8; the file is the old or the new one, never half of it.

    Raises:
        FastslimFileError: the disk refuses.
    """
    with new_file(path, path.suffix, overwrite=True) as place, _named(path):
        place.write_text(text, encoding="utf-8")


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raises FastslimFileError when something is there and may not be replaced."""
    if path.exists() and not overwrite:
        raise FastslimFileError(f"{path} exists already: choose another name, or pass overwrite=True")


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary folder on the same disk, gone afterwards."""
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():  # left over by a process of this number that was killed
            shutil.rmtree(folder)
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except FastslimFileError:
        raise
    except OSError as error:
        raise FastslimFileError(f"cannot write {path}: {error.strerror or error}") from error


def _sync(path: Path) -> None:
    """Forces a file, or the renames in a folder where the system allows it, to disk."""
    with contextlib.suppress(PermissionError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
