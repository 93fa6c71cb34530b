"""Augmentation whose randomness is a pure function of (seed, epoch, index), so a resumed run sees the same images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

Transform = Callable[[Any, torch.Generator], Tensor]


def random_int(low: int, high: int, generator: torch.Generator) -> int:
    """A whole number in [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def random_affine(
    image: Tensor, generator: torch.Generator, *, degrees: float = 10, stretch: float = 0.1, pixels: float = 1
) -> Tensor:
    """Rotates, scales, slants and shifts (C, H, W) a little; the border is repeated into the gap.

    Args:
        image: what is seen.
        generator: all randomness.
        degrees: largest rotation.
        stretch: largest change of the scale, and largest slant.
        pixels: largest shift along each axis.
    """
    turn, scale, slant, right, down = (2 * torch.rand(5, generator=generator) - 1).tolist()
    angle, factor = math.radians(degrees * turn), 1 + stretch * scale
    cosine, sine = factor * math.cos(angle), factor * math.sin(angle)
    _, height, width = image.shape
    matrix = torch.tensor(
        [[cosine, stretch * slant - sine, 2 * pixels * right / width], [sine, cosine, 2 * pixels * down / height]]
    )
    grid = nn.functional.affine_grid(matrix[None], [1, *image.shape], align_corners=False)
    return nn.functional.grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]


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
