"""A folder with the module of a run that takes a second, as the current one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from tiny_run_source import FLAGS, MODULE

from fastslim.cli.commands import fastslim
from fastslim.engine import plot

Call = Callable[..., Result]


@pytest.fixture
def call() -> Call:
    """Runs the command line with these words."""

    def run(*words: object) -> Result:
        torch.set_num_threads(1)
        return CliRunner().invoke(fastslim, [str(word) for word in words])

    return run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with tiny_run.py in it; pictures are composed but not rendered, which would take longer."""
    (tmp_path / "tiny_run.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.delitem(sys.modules, "tiny_run", raising=False)
    monkeypatch.setattr(plot, "save_figure", lambda _, path: path.write_bytes(b"picture"))
    return tmp_path


@pytest.fixture
def run(home: Path, call: Call) -> str:
    """The folder of a finished run, seen from the current one."""
    result = call("train", "--run", "run", *FLAGS)
    assert result.exit_code == 0, result.output
    return "run"
