"""Augmentation: what it does to an image, and that its randomness is only (seed, epoch, index)."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

from fastslim.data import Augmented, random_crop_flip, random_shift
from fastslim.data.augment import mixed_generator


def numbered_image(height: int, width: int) -> torch.Tensor:
    return torch.arange(height * width, dtype=torch.float32).view(1, height, width)


def test_shift_moves_the_image_by_at_most_one_pixel() -> None:
    image = numbered_image(5, 6)
    seen = set()
    for seed in range(100):
        shifted = random_shift(image, mixed_generator(seed))
        value = int(shifted[0, 2, 3])
        moved = (value // 6 - 2, value % 6 - 3)
        inner = image[:, 1 + moved[0] : 4 + moved[0], 1 + moved[1] : 5 + moved[1]]
        assert torch.equal(shifted[:, 1:-1, 1:-1], inner)
        seen.add(moved)
    assert seen == {(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}


def test_crop_flip_returns_a_square_of_the_image() -> None:
    image = numbered_image(7, 9)
    flipped = 0
    for seed in range(40):
        cut = random_crop_flip(image, mixed_generator(seed), size=5)
        step = int(cut[0, 0, 1] - cut[0, 0, 0])
        assert cut.shape == (1, 5, 5) and step in (-1, 1)
        corner = int(cut[0, 0, 0 if step == 1 else -1])
        top, left = corner // 9, corner % 9
        original = image[:, top : top + 5, left : left + 5]
        assert torch.equal(cut, original if step == 1 else original.flip(-1))
        flipped += step == -1
    assert 10 < flipped < 30


def test_randomness_is_only_seed_epoch_and_index() -> None:
    base = TensorDataset(torch.randn(20, 1, 8, 8), torch.arange(20))

    def images(seed: int, epoch: int, global_seed: int) -> torch.Tensor:
        torch.manual_seed(global_seed)
        dataset = Augmented(base, random_shift, seed)
        dataset.set_epoch(epoch)
        return torch.stack([dataset[i][0] for i in range(20)])

    assert torch.equal(images(0, 3, global_seed=0), images(0, 3, global_seed=1))
    assert not torch.equal(images(0, 3, global_seed=0), images(0, 4, global_seed=0))
    assert not torch.equal(images(0, 3, global_seed=0), images(1, 3, global_seed=0))


@pytest.mark.parametrize("numbers", [[(i,) for i in range(500)], [(0, i, j) for i in range(25) for j in range(20)]])
def test_mixed_generators_differ(numbers: list[tuple[int, ...]]) -> None:
    assert len({mixed_generator(*each).initial_seed() for each in numbers}) == len(numbers)
