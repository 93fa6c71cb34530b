"""Loading the library: plain messages without one, whatever the reason."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastslim
from fastslim import _ext

PACKAGE = Path(fastslim.__file__).parent
# An editable install would find the library whatever folder is asked for.
NO_EDITABLE_FINDER = """import sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
"""


def run_python(code: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter; `cwd` comes first on its path."""
    env = {**os.environ, "PYTHONPATH": str(cwd or PACKAGE.parent), **environment}
    command = [sys.executable, "-c", NO_EDITABLE_FINDER + code]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture
def copied(tmp_path):
    """The package without its compiled libraries."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    return shutil.copytree(PACKAGE, tmp_path / "fastslim", ignore=ignore)


def test_without_the_library_the_error_says_how_to_build_it(copied):
    done = run_python("import fastslim", cwd=copied.parent)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fastslim's compiled library is not built")
    assert "pip install" in last


def test_a_library_of_another_build_is_told_apart_from_none(copied):
    suffix = Path(next(PACKAGE.glob("_C.*.so"))).name
    (copied / suffix).write_bytes(b"not a library")
    done = run_python("import fastslim", cwd=copied.parent)
    last = done.stderr.strip().splitlines()[-1]
    assert "was built for another Python or torch" in last
    assert suffix in last
    assert "Build it again" in last


def test_the_cuda_library_is_usable_or_says_why_not():
    assert _ext.CUDA_UNUSABLE is None or len(_ext.CUDA_UNUSABLE) > 10


def test_unknown_instruction_set_is_ignored_for_the_best_one():
    code = "from fastslim import _ext; print(_ext.BUILD['cpu_isa'])"
    best = run_python(code).stdout
    assert run_python(code, FASTSLIM_CPU_ISA="sse9").stdout == best
