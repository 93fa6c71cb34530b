"""Augmentation whose randomness is a pure function of (seed, epoch, index), so a resumed run sees the same images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

Transform = Callable[[Any, torch.Generator], Tensor]


def random_int(low: int, high: int, generator: torch.Generator) -> int:
    """A whole number in [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def random_shift(image: Tensor, generator: torch.Generator, pixels: int = 1) -> Tensor:
    """Shifts (C, H, W) by up to ``pixels`` in each direction; the border is repeated into the gap."""
    top, left = (random_int(0, 2 * pixels, generator) for _ in range(2))
    _, height, width = image.shape
    padded = nn.functional.pad(image[None], (pixels,) * 4, mode="replicate")[0]
    return padded[:, top : top + height, left : left + width]


def random_crop_flip(image: Tensor, generator: torch.Generator, size: int) -> Tensor:
    """Cuts a random (C, size, size) square out of (C, H, W) and mirrors every second one."""
    _, height, width = image.shape
    top, left = random_int(0, height - size, generator), random_int(0, width - size, generator)
    cut = image[:, top : top + size, left : left + size]
    return cut.flip(-1) if random_int(0, 1, generator) else cut


class Augmented(Dataset[tuple[Tensor, int]]):
    """A dataset seen through a random transform.

    Args:
        base: yields ``(image, label)``.
        transform: called with the image and a generator that is all its randomness.
        seed: another seed, other transforms.
    """

    def __init__(self, base: Dataset[Any], transform: Transform, seed: int = 0) -> None:
        self.base = base
        self.transform = transform
        self.seed = seed
        self.epoch = 0
        self.classes = getattr(base, "classes", None)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose transforms follow."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.base)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.base[index]
        return self.transform(image, mixed_generator(self.seed, self.epoch, index)), label


def mixed_generator(*numbers: int) -> torch.Generator:
    """A generator seeded by several numbers; neighbouring numbers give unrelated streams."""
    seed = 0
    for number in numbers:
        # splitmix64's finaliser (Steele et al., 2014): every input bit reaches every output bit.
        seed = (seed + number + 0x9E3779B97F4A7C15) % 2**64
        seed = (seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        seed = (seed ^ (seed >> 27)) * 0x94D049BB133111EB % 2**64
        seed ^= seed >> 31
    return torch.Generator().manual_seed(seed % 2**63)
