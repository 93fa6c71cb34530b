"""Batches read once, held on the network's device, and recognised again by their digest."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastslim.algorithms import Batch, SlimmableAlgorithm
from fastslim.errors import FastslimRuntimeError, FastslimTypeError, FastslimValueError


class HeldBatches:
    """The first batches of a loader, on the device: every candidate sees the same data, read and copied once.

    Args:
        algo: unpacks what the loader yields.
        loader: yields batches.
        what: "validation" or "calibration", for messages.
        argument: the argument that limits the number of batches, for messages.
        num_batches: take at most so many.
        num_samples: take no more batches once there are so many samples.
        seed: of torch's and Python's generators while the loader is read, so that a shuffling loader gives the same
            batches again; both are put back.

    Attributes:
        batches: inputs and targets.
        sizes: samples in each batch.
        digest: changes with the data.

    Raises:
        FastslimValueError: the loader yields nothing.
        FastslimTypeError: the loader cannot be iterated, or yields no tensors.
        FastslimRuntimeError: the device's memory is too small.
    """

    def __init__(
        self,
        algo: SlimmableAlgorithm,
        loader: Iterable[Any],
        *,
        what: str,
        argument: str,
        num_batches: int | None = None,
        num_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        if num_batches is not None and (isinstance(num_batches, bool) or not isinstance(num_batches, int)):
            raise FastslimTypeError(f"{argument} should be a whole number or None, but got {num_batches!r}")
        if num_batches is not None and num_batches < 1:
            raise FastslimValueError(f"{argument}={num_batches} should be at least 1, or None")
        if not isinstance(loader, Iterable):
            raise FastslimTypeError(
                f"the {what} loader should yield batches (inputs, targets), but {type(loader).__name__} cannot be "
                "iterated"
            )
        self.batches: list[Batch] = []
        self.sizes: list[int] = []
        digest = hashlib.blake2b(digest_size=16)
        device = next(algo.architecture.parameters()).device
        with _seeded(seed):
            for data in loader:
                batch = algo.unpack(data, training=False)
                tensors = batch.tensors()
                if not tensors or tensors[0].dim() == 0:
                    raise FastslimTypeError(f"a batch of the {what} loader holds no tensor with a dimension of samples")
                for leaf in tree_leaves(tuple(batch)):
                    update_digest(digest, leaf)
                try:
                    self.batches.append(Batch(*tree_map(lambda value: _moved(value, device), tuple(batch))))
                except torch.OutOfMemoryError as error:
                    raise FastslimRuntimeError(
                        f"{device} has no room for more than {len(self.batches)} {what} batches: pass "
                        f"{argument}={max(len(self.batches) // 2, 1)}"
                    ) from error
                self.sizes.append(len(tensors[0]))
                if len(self.batches) == num_batches or (num_samples is not None and self.samples >= num_samples):
                    break
        if not self.samples:
            raise FastslimValueError(f"the {what} loader yields no samples; give it data that can be read again")
        self.digest = digest.hexdigest()

    @property
    def samples(self) -> int:
        """Number of samples in all batches."""
        return sum(self.sizes)


def update_digest(digest: Any, value: Any) -> None:
    """Adds a tensor's bytes, or what else a value prints as."""
    if not isinstance(value, Tensor):
        # An object's default text holds its address, which is another in every process.
        digest.update(repr(value).encode() if isinstance(value, (int, float, str)) else type(value).__name__.encode())
        return
    digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
    flat = value.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)


def _moved(value: Any, device: torch.device) -> Any:
    return value.detach().to(device, non_blocking=True) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    before = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            yield
    finally:
        random.setstate(before)
