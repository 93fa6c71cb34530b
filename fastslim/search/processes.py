"""The processes of a torch.distributed group search together: each scores some of the subnets, all decide the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastslim.errors import FastslimError, FastslimRuntimeError, FastslimValueError

Item = TypeVar("Item")
Value = TypeVar("Value")


class Processes:
    """The default group; a single process where there is none.

    Args:
        device: where the network is; messages of a group of GPUs have to lie there.

    Attributes:
        rank: number of this process; the first one writes the files.
        size: how many there are.
    """

    def __init__(self, device: torch.device) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self.device = device if together and device.type == "cuda" else torch.device("cpu")

    def share(self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[float]]) -> list[float]:
        """A number for each item; every process works on as many of them.

        Args:
            items: the same ones in every process.
            work: gives the numbers of some items.

        Raises:
            FastslimRuntimeError: another process has failed; it says why itself.
        """
        if self.size == 1 or not items:
            return list(work(items)) if items else []
        numbers = torch.zeros(len(items) + 1, dtype=torch.float64)  # the last one counts those that have failed
        try:
            numbers[self.rank : -1 : self.size] = torch.tensor(work(items[self.rank :: self.size]), dtype=torch.float64)
        except Exception:
            numbers.zero_()[-1] = 1
            self._sum(numbers)
            raise
        if self._sum(numbers)[-1]:
            raise FastslimRuntimeError("another process of the group has failed, see its message")
        return numbers[:-1].tolist()

    def check_same(self, things: Mapping[str, Any]) -> None:
        """Refuses a group whose processes do not search the same.

        Raises:
            FastslimValueError: names what differs.
        """
        if self.size == 1:
            return
        digests = [hashlib.blake2b(json.dumps(value).encode(), digest_size=6).digest() for value in things.values()]
        own = torch.tensor([int.from_bytes(digest, "big") for digest in digests], dtype=torch.int64, device=self.device)
        low, high = own.clone(), own.clone()
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        for name, same in zip(things, (low == high).tolist(), strict=True):
            if not same:
                raise FastslimValueError(
                    f"the processes of the group have different {name}; each has to be given the same weights, budgets "
                    "and batches (no DistributedSampler: they share the subnets, not the data)"
                )

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What the first process makes, in all of them; what it raises, too."""
        if self.size == 1:
            return make()
        result: list[Any] = [None, None]
        if self.rank == 0:
            try:
                result[0] = make()
            except FastslimError as error:
                result[1] = error
        dist.broadcast_object_list(result, 0, device=self.device)
        if result[1] is not None:
            raise result[1]
        return result[0]

    def _sum(self, numbers: torch.Tensor) -> torch.Tensor:
        there = numbers.to(self.device)
        dist.all_reduce(there)
        return numbers.copy_(there)
