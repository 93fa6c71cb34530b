"""Converting a network against one run of its forward: analysis, swapping of layers, execution plan."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastslim
from fastslim import models


class Block(nn.Module):
    """Three layers, a residual, and a parameter that forward uses directly."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.out, self.scale = nn.Conv2d(channels, channels, 1), nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, channels, H, W) -> the same."""
        return x + self.out(torch.relu(self.norm(self.conv(x)))) * self.scale


CASES = {
    "resnet50": (models.resnet50, (1, 3, 224, 224)),
    "300 layers": (lambda: nn.Sequential(nn.Conv2d(3, 16, 3), *(Block(16) for _ in range(100))), (1, 3, 64, 64)),
    "600 layers": (lambda: nn.Sequential(nn.Conv2d(3, 16, 3), *(Block(16) for _ in range(200))), (1, 3, 64, 64)),
}


@pytest.mark.parametrize("name", CASES)
def test_convert(against, name):
    build, shape = CASES[name]
    model, images = build().eval(), torch.randn(shape)

    def forward() -> None:
        with torch.no_grad():
            model(images)

    against(lambda: fastslim.convert(build(), shape), forward=forward)
