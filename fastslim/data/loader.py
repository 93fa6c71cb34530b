"""Loaders whose order depends on (seed, epoch) alone and which can start in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler

from fastslim.data.augment import mixed_generator
from fastslim.errors import FastslimValueError


class EpochShuffle(Sampler[int]):
    """Shuffled indices, a pure function of (seed, epoch).

    Args:
        length: number of samples.
        seed: another seed, another sequence of orders.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0
        self.skip = 0

    def __len__(self) -> int:
        return self.length - self.skip

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.length, generator=mixed_generator(self.seed, self.epoch))
        return iter(order[self.skip :].tolist())


def make_loader(
    dataset: Dataset[Any], batch_size: int, *, shuffle: bool, seed: int = 0, workers: int = 0, pin_memory: bool = False
) -> DataLoader[Any]:
    """A loader of ``(images, labels)`` batches.

    Args:
        dataset: yields ``(image, label)``.
        batch_size: images a batch. While shuffling, a last batch that is smaller is left out, unless it is the only
            one.
        shuffle: for training; see `start_epoch`.
        seed: seed of the order.
        workers: processes that read images.
        pin_memory: keep batches in page-locked memory, for copies to a GPU.

    Raises:
        FastslimValueError: an impossible batch size or number of workers.
    """
    length = len(dataset)  # type: ignore[arg-type]
    if batch_size < 1:
        raise FastslimValueError(f"batch_size={batch_size}: must be at least 1")
    if workers < 0:
        raise FastslimValueError(f"workers={workers}: use 0 to read in the main process")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochShuffle(length, seed) if shuffle else SequentialSampler(range(length)),
        drop_last=shuffle and length >= batch_size,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=mixed_generator(seed),
    )


def start_epoch(loader: DataLoader[Any], epoch: int, skip_batches: int = 0) -> None:
    """Chooses the order and the augmentation of an epoch.

    Args:
        loader: made by `make_loader` with ``shuffle=True``.
        epoch: number of the epoch, from 0.
        skip_batches: batches already trained, left out without being read.
    """
    sampler = loader.sampler
    assert isinstance(sampler, EpochShuffle)
    sampler.epoch = epoch
    sampler.skip = skip_batches * (loader.batch_size or 1)
    # The loader draws its workers' seeds from here.
    loader.generator.manual_seed(mixed_generator(sampler.seed, epoch).initial_seed())
    if hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(epoch)
