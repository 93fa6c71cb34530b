"""What a trace costs: work that grows linearly with the network."""

import os
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastslim.graph import trace


class Residual(nn.Module):
    """A residual block that uses a parameter directly."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x):
        return x + self.out(F.relu(self.norm(self.conv(x)))) * self.scale


def work(model, inputs):
    """How many functions of fastslim an analysis calls."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call" and f"{os.sep}fastslim{os.sep}" in frame.f_code.co_filename

    sys.setprofile(count)
    try:
        trace(model, inputs)
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("block", [Residual, lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)])
def test_work_grows_linearly_with_depth(block):
    shape = (1, 8, 4, 4) if block is Residual else (1, 4, 8)
    head = nn.Conv2d(8, 8, 1) if block is Residual else nn.Linear(8, 8)
    short, long = (work(nn.Sequential(head, *(block() for _ in range(depth))), shape) for depth in (6, 12))
    assert long < 2.1 * short
