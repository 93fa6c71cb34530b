"""The embedded digits: a fixed stratified split, normalised by its training part."""

from __future__ import annotations

import random

import numpy as np
import torch

from fastslim.data import digits


def test_held_out_part_is_a_fifth_of_every_class() -> None:
    train, val = digits()
    assert len(train) + len(val) == 1797
    everything = torch.cat([train.tensors[1], val.tensors[1]])
    for label in range(10):
        held_out, total = (labels.eq(label).sum().item() for labels in (val.tensors[1], everything))
        assert abs(held_out - 0.2 * total) <= 0.5


def test_split_does_not_depend_on_seeds() -> None:
    sets = []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        sets.append(digits())
    for first, second in zip(*sets, strict=True):
        assert torch.equal(first.tensors[0], second.tensors[0])
        assert torch.equal(first.tensors[1], second.tensors[1])


def test_no_image_is_in_both_parts() -> None:
    from sklearn.datasets import load_digits

    train, val = digits()
    pixels = torch.cat([train.tensors[0], val.tensors[0]]).flatten(1)
    original = torch.from_numpy(load_digits().images).float().flatten(1)
    scale = (original.max() - original.min()) / (pixels.max() - pixels.min())
    restored = ((pixels - pixels.min()) * scale).round()
    assert sorted(map(tuple, restored.tolist())) == sorted(map(tuple, original.tolist()))


def test_training_part_has_zero_mean_and_unit_variance() -> None:
    images, labels = digits()[0].tensors
    std, mean = torch.std_mean(images)
    assert images.shape == (1438, 1, 8, 8) and images.dtype == torch.float32 and labels.dtype == torch.int64
    torch.testing.assert_close(mean, torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.tensor(1.0), atol=1e-5, rtol=0)
