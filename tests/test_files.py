"""A file is the old or the new one, whatever interrupts the writing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest

from fastslim.errors import FastslimFileError
from fastslim.files import replace_file, write_atomically


def test_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "old")
    write_atomically(path, "new ×")
    assert path.read_text(encoding="utf-8") == "new ×"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), RuntimeError("broken"), MemoryError()])
def test_interrupted_writing_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(stream: IO[bytes]) -> None:
        stream.write(b"half of the n")
        raise error

    with pytest.raises(type(error)):
        replace_file(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_is_named_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(stream: IO[bytes]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(FastslimFileError, match=r"cannot write \S*a\.txt: No space left on device"):
        replace_file(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FastslimFileError, match=r"cannot write \S*gone/a\.txt: No such file or directory"):
        write_atomically(tmp_path / "gone" / "a.txt", "new")


def test_kill_in_the_middle_of_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    started = tmp_path / "started"
    program = (
        "import time, pathlib\n"
        "from fastslim.files import replace_file\n"
        "def write(stream):\n"
        "    stream.write(b'half'); stream.flush()\n"
        f"    pathlib.Path({str(started)!r}).touch(); time.sleep(60)\n"
        f"replace_file(pathlib.Path({str(path)!r}), write)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        deadline = time.monotonic() + 60
        while not started.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert started.exists()
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert path.read_text() == "old"
