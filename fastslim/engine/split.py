"""The part of the training data that subnets are compared on while searching: never the held-out data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from fastslim.data import ImageData
from fastslim.errors import FastslimValueError

#: The split belongs to the data, like the one into training and held-out images: no seed of a run changes it.
SPLIT_SEED = 0


class Part(Dataset[Any]):
    """Some items of a dataset, which keep their own augmentation.

    Args:
        base: the dataset.
        indices: of its items.
    """

    def __init__(self, base: Dataset[Any], indices: Sequence[int]) -> None:
        self.base = base
        self.indices = list(indices)
        self.classes = getattr(base, "classes", None)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the augmentation of an epoch, where there is any."""
        if hasattr(self.base, "set_epoch"):
            self.base.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.base[self.indices[index]]


def split_indices(length: int, share: float) -> tuple[list[int], list[int]]:
    """Which items are left out for the search, and which stay; both in order, always the same."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    count = round(share * length)
    return sorted(order[:count]), sorted(order[count:])


def without_search_part(data: ImageData, share: float) -> ImageData:
    """The data, with a share of the training images left out for the search.

    Raises:
        FastslimValueError: the share is not a single image.
    """
    if not share:
        return data
    length = len(data.train)  # type: ignore[arg-type]
    left_out, rest = split_indices(length, share)
    if not left_out:
        raise FastslimValueError(
            f"search_share={share}: of {length} training images that is none; give at least {1 / length:.2g}"
        )
    return dataclasses.replace(data, train=Part(data.train, rest), calibration=Part(data.calibration, rest))


def search_part(data: ImageData, share: float) -> Dataset[Any]:
    """The images that subnets are compared on, without augmentation.

    Those that the supernet was not trained on, where its run left some out: a network that knows images by heart
    scores them alike at every width. Else all training images.

    Args:
        data: all of it.
        share: that the run has left out.
    """
    length = len(data.calibration)  # type: ignore[arg-type]
    return Part(data.calibration, split_indices(length, share)[0]) if share else data.calibration
