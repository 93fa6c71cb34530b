"""Loaders: the order is a function of (seed, epoch), and an epoch can start in its middle."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils.data import TensorDataset

from fastslim.data import make_loader, start_epoch
from fastslim.errors import FastslimValueError

NUMBERS = TensorDataset(torch.arange(50).float(), torch.arange(50))


def order(seed: int, epoch: int, skip: int = 0, workers: int = 0) -> list[list[int]]:
    loader = make_loader(NUMBERS, 8, shuffle=True, seed=seed, workers=workers)
    start_epoch(loader, epoch, skip)
    return [labels.tolist() for _, labels in loader]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    first = order(0, 3)
    torch.manual_seed(2)
    assert order(0, 3) == first
    assert order(0, 4) != first and order(1, 3) != first


def test_skipped_batches_are_the_first_ones() -> None:
    assert order(0, 3, skip=2) == order(0, 3)[2:]
    assert order(0, 3, skip=6) == []


def test_workers_read_the_same_order() -> None:
    assert order(0, 1, workers=2) == order(0, 1)


def test_only_full_batches_are_trained_unless_there_is_none() -> None:
    assert [len(batch) for batch in order(0, 0)] == [8] * 6
    loader = make_loader(NUMBERS, 64, shuffle=True)
    assert [len(labels) for _, labels in loader] == [50]
    assert [len(labels) for _, labels in make_loader(NUMBERS, 8, shuffle=False)] == [8] * 6 + [2]


def test_loader_can_be_iterated_again() -> None:
    loader = make_loader(NUMBERS, 8, shuffle=True)
    assert [x.tolist() for x, _ in loader] == [x.tolist() for x, _ in loader]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 0}, "batch_size=0: must be at least 1"), ({"batch_size": 8, "workers": -1}, "workers=-1: use 0")],
)
def test_impossible_option_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(FastslimValueError, match=re.escape(message)):
        make_loader(NUMBERS, shuffle=True, **options)
