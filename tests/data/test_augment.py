"""Augmentation: what it does to an image, and that its randomness is only (seed, epoch, index)."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

from fastslim.data import Augmented, random_affine, random_crop_flip
from fastslim.data.augment import mixed_generator


def numbered_image(height: int, width: int) -> torch.Tensor:
    return torch.arange(height * width, dtype=torch.float32).view(1, height, width)


def test_affine_stays_within_its_limits() -> None:
    image = torch.zeros(1, 9, 9)
    image[0, 4, 4] = 1.0
    centres = []
    for seed in range(60):
        seen = random_affine(image, mixed_generator(seed), pixels=1)
        rows, columns = (seen[0] * torch.arange(9.0)[shape] for shape in ((slice(None), None), (None, slice(None))))
        centres.append((rows.sum() / seen.sum(), columns.sum() / seen.sum()))
    offsets = torch.tensor(centres) - 4
    assert 0.7 < offsets.abs().max() < 1.35
    assert (offsets.mean(0).abs() < 0.3).all()


def test_affine_without_room_is_the_identity() -> None:
    image = torch.randn(2, 5, 6)
    still = random_affine(image, mixed_generator(0), degrees=0, stretch=0, pixels=0)
    torch.testing.assert_close(still, image, atol=1e-5, rtol=1e-5)


def test_affine_repeats_the_border() -> None:
    for seed in range(20):
        seen = random_affine(torch.full((1, 8, 8), 3.0), mixed_generator(seed), pixels=3)
        torch.testing.assert_close(seen, torch.full((1, 8, 8), 3.0))


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
        dataset = Augmented(base, random_affine, seed)
        dataset.set_epoch(epoch)
        return torch.stack([dataset[i][0] for i in range(20)])

    assert torch.equal(images(0, 3, global_seed=0), images(0, 3, global_seed=1))
    assert not torch.equal(images(0, 3, global_seed=0), images(0, 4, global_seed=0))
    assert not torch.equal(images(0, 3, global_seed=0), images(1, 3, global_seed=0))


@pytest.mark.parametrize("numbers", [[(i,) for i in range(500)], [(0, i, j) for i in range(25) for j in range(20)]])
def test_mixed_generators_differ(numbers: list[tuple[int, ...]]) -> None:
    assert len({mixed_generator(*each).initial_seed() for each in numbers}) == len(numbers)
