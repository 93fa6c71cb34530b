"""The processes that train one supernet together: the same widths everywhere, one all-reduce a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastslim import errors
from fastslim.ops.step_buffers import StepBuffers

if TYPE_CHECKING:
    from fastslim.mutators import ChannelMutator

_BUCKET_BYTES = 250 * 1024 * 1024  # DistributedDataParallel's


class Ranks:
    """Keeps the processes of a group equal.

    Args:
        group: a process group; None is the default one.
        broadcast_buffers: start every step from the first process's running statistics.

    Raises:
        FastslimRuntimeError: no process group has been started.
    """

    def __init__(self, group: Any = None, *, broadcast_buffers: bool = True) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise errors.FastslimRuntimeError(
                "there is no process group: start with torchrun and call torch.distributed.init_process_group() first"
            )
        self.group, self.broadcast_buffers = group, broadcast_buffers
        self.size = dist.get_world_size(group)
        self._first = dist.get_global_rank(group, 0) if group is not None else 0

    def start(self, model: nn.Module, mutator: ChannelMutator) -> None:
        """Gives every process the first one's weights, statistics and random widths."""
        self.broadcast([*model.parameters(), *model.buffers()])
        state = [mutator.rng.getstate()]
        device = next((p.device for p in model.parameters()), None)
        dist.broadcast_object_list(state, self._first, self.group, device if dist.get_backend() == "nccl" else None)
        mutator.rng.setstate(state[0])

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """The first process's values for everyone, in few messages."""
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
        group = self.group or dist.group.WORLD
        for same in groups.values():
            dist._broadcast_coalesced(group, same, _BUCKET_BYTES, 0)

    def begin_step(self, model: nn.Module) -> None:
        """Before the passes of a step."""
        if self.broadcast_buffers and self.size > 1:
            self.broadcast(model.buffers())

    def average(self, buffers: StepBuffers) -> None:
        """The mean of all processes' gradients in each one's ``param.grad``: one message per dtype."""
        if self.size == 1:
            return
        for flat in buffers.flat.values():
            dist.all_reduce(flat, group=self.group)
            flat.div_(self.size)
        for p in buffers.parameters:
            if p.grad is not None and p.grad.is_sparse:
                dist.all_reduce(p.grad, group=self.group)
                p.grad.div_(self.size)
