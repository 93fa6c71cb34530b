"""Data and networks of runs that take a second: 48 grey images of three classes, three convolutions."""

from __future__ import annotations

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

#: Flags of `fastslim train` for such a run, with the module above as tiny_run.py in the current folder.
FLAGS = (
    "--data tiny_run:load --model tiny_run:build_pooled --choices 0.25,0.5,0.75,1 --divisor 2 --epochs 3 "
    "--batch-size 12 --eval-widths 3 --no-tensorboard --search-share 0.25"
).split()
