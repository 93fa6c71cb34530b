"""A run that takes a second: a net of three convolutions on 48 grey images of three classes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_run_source import MODULE

from fastslim.engine import plot
from fastslim.engine.config import TrainConfig
from fastslim.engine.run import train


@pytest.fixture
def tiny_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module ``tiny_run`` with the functions that `tiny` names; its folder is returned."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "tiny_run.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("tiny_run", None)


@pytest.fixture
def tiny(tiny_module: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """Three epochs of three steps; pictures are composed but not rendered, which would take longer than the run."""
    torch.set_num_threads(1)
    monkeypatch.setattr(plot, "save_figure", lambda _, path: path.write_bytes(b"picture"))
    return TrainConfig(
        data="tiny_run:load",
        model="tiny_run:build",
        choices=(0.25, 0.5, 1.0),
        divisor=2,
        epochs=3,
        batch_size=16,
        lr=0.05,
        eval_widths=3,
        tensorboard=False,
    )


@pytest.fixture
def trained(tiny: TrainConfig, tmp_path: Path) -> Path:
    """The folder of a finished run of `tiny` that has left 12 images out for the search."""
    train(tiny.replace(epochs=2, search_share=0.25), tmp_path / "run")
    return tmp_path / "run"
