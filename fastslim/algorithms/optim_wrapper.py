"""Steps by an optimizer wrapper (mmengine's, or one with its methods): every pass is one of its updates.

The wrapper divides each loss by its ``accumulative_counts``, scales it for mixed precision, and steps, clips and
zeroes when it thinks fit. Nothing of mmengine is imported: its methods are what counts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_METHODS = ("update_params", "optim_context", "should_sync")


def is_optim_wrapper(optimizer: Any) -> bool:
    """Whether this has the methods of mmengine's ``OptimWrapper``."""
    return all(callable(getattr(optimizer, name, None)) for name in _METHODS)


def count_passes(wrapper: Any, model: torch.nn.Module, passes: int) -> None:
    """Tells a wrapper that counts a runner's iterations that each of them updates `passes` times.

    Its last updates, which may be fewer than ``accumulative_counts``, then come out right.
    """
    counts = getattr(wrapper, "_accumulative_counts", passes)
    if passes % counts and counts % passes:
        warnings.warn(
            f"accumulative_counts={counts} does not go evenly into {passes} passes a step: some optimizer steps mix "
            f"passes of two batches; {passes} makes one step a batch",
            stacklevel=5,
        )
    elif counts < passes:
        warnings.warn(
            f"accumulative_counts={counts}: the optim wrapper makes {passes // counts} optimizer steps for each batch "
            f"of {passes} passes; accumulative_counts={passes} makes one, with the mean of their gradients",
            stacklevel=5,
        )
    information = getattr(getattr(wrapper, "message_hub", None), "runtime_info", {})
    if "iter" in information and "max_iters" in information:
        wrapper.initialize_count_status(model, information["iter"] * passes, information["max_iters"] * passes)


class _Announced(torch.autograd.Function):
    """The identity; calls a function when the backward pass that it begins has ended."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, ended: Callable[[], None]) -> Tensor:
        ctx.ended = ended
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # The way DistributedDataParallel learns of the end; only reachable from inside a backward pass.
        torch.autograd.Variable._execution_engine.queue_callback(ctx.ended)
        return gradient, None


def announcing(loss: Tensor, ended: Callable[[], None]) -> Tensor:
    """A loss equal to `loss`, after whose backward pass `ended` is called, before ``backward()`` returns."""
    return _Announced.apply(loss, ended)
