"""A run that takes a second: a net of three convolutions on 48 grey images of three classes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastslim.engine import plot
from fastslim.engine.config import TrainConfig

MODULE = '''
import torch
from torch import nn
from torch.utils.data import TensorDataset

def load():
    """Bright rows: class 0 at the top, 1 in the middle, 2 at the bottom; with noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(72) % 3
    images = 0.5 * torch.randn(72, 1, 6, 6, generator=generator)
    for index, label in enumerate(labels):
        images[index, 0, 2 * label : 2 * label + 2] += 1
    return TensorDataset(images[:48], labels[:48]), TensorDataset(images[48:], labels[48:])

def build(num_classes, in_channels):
    layers = []
    for c_in, c_out in ((in_channels, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 36, num_classes))

def build_pooled(num_classes, in_channels):
    layers = []
    for c_in, c_out in ((in_channels, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32 * 4, num_classes))

def build_wider(num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 16, num_classes)
    )
'''


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
