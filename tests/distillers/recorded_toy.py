"""Functions, methods and a network that the recorders of the tests watch."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn


def scale(x: Tensor, factor: float = 2.0, *, shift: float = 0.0) -> Tensor:
    return x * factor + shift


class Pool:
    def mean(self, x: Tensor, dim: int = 1) -> Tensor:
        return x.mean(dim, keepdim=True)

    @staticmethod
    def double(x: Tensor) -> Tensor:
        return 2 * x

    @classmethod
    def name(cls, x: Tensor) -> str:
        return cls.__name__


class SmallPool(Pool):
    pass


class Net(nn.Module):
    """A layer that runs twice, a function, a method, and a head."""

    def __init__(self, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Linear(4, width)
        self.block = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(self.stem(x)))
        # Looked up at every call, as a replaced function must be.
        x = sys.modules[__name__].scale(x, shift=1.0)
        return self.head(x - SmallPool().mean(x))
