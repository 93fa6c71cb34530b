"""batch_norm_act computed by Triton: checks the arguments, gathers segments, launches the kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fastslim import errors
from fastslim.ops import backend
from fastslim.ops.batch_norm_act_schema import define

# The kernels are imported when they are first launched: importing Triton costs half a second.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LIBRARY = torch.library.Library("fastslim", "FRAGMENT")


def register() -> None:
    """Defines ``fastslim::batch_norm_act_triton`` and its backward; on the CPU Triton's interpreter computes them."""
    define("_triton")
    for key in ("CUDA", "CPU") if backend.interpreting() else ("CUDA",):
        _LIBRARY.impl("batch_norm_act_triton", _forward, key)
        _LIBRARY.impl("batch_norm_act_backward_triton", _backward, key)


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: int,
    segments: Sequence[int],
) -> tuple[Tensor, Tensor]:
    from fastslim.kernels.batch_norm_act import launch_batch_norm_act_fwd

    _check(x, {"residual": residual}, activation)
    if training and x.numel() == x.shape[1] > 0:
        raise errors.FastslimValueError("batch_norm_act: more than 1 value per channel is needed in training")
    if (running_mean is None) != (running_var is None) or not (training or running_mean is not None):
        raise errors.FastslimValueError("batch_norm_act: give both running statistics; evaluation needs them")
    weight, bias = _active(weight, x, segments, "weight"), _active(bias, x, segments, "bias")
    mean, var = _active(running_mean, x, segments, "running_mean"), _active(running_var, x, segments, "running_var")
    with _device_of(x):
        y, stats = launch_batch_norm_act_fwd(
            x, weight, bias, mean, var, residual, training=training, momentum=momentum, eps=eps, activation=activation
        )
        if training and x.numel():
            _scatter(mean, running_mean, segments)
            _scatter(var, running_var, segments)
    return y, stats


def _backward(
    dy: Tensor,
    x: Tensor,
    extra: Tensor | None,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    activation: int,
    want_residual: bool,
    want_parameters: bool,
    segments: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastslim.kernels.batch_norm_act_backward import launch_batch_norm_act_bwd

    _check(x, {"dy": dy, "y or residual": extra}, activation)
    if want_residual and extra is None:
        raise errors.FastslimValueError("batch_norm_act: the residual's gradient needs y or the residual")
    if stats.shape != (2, x.shape[1]) or stats.dtype != torch.float64 or not stats.is_contiguous():
        raise errors.FastslimValueError("batch_norm_act: stats must be what the forward returned")
    weight, bias = _active(weight, x, segments, "weight"), _active(bias, x, segments, "bias")
    with _device_of(x):
        return launch_batch_norm_act_bwd(
            dy, x, extra, stats, weight, bias, training=training, activation=activation,
            want_residual=want_residual, want_parameters=want_parameters,
        )  # fmt: skip


def _check(x: Tensor, others: dict[str, Tensor | None], activation: int) -> None:
    """Refuses what the kernels would read out of bounds or misread."""
    from fastslim.kernels.batch_norm_act_tiles import dense_like, is_dense

    if x.dim() < 2 or not is_dense(x):
        raise errors.FastslimValueError("batch_norm_act: x must be (N, C, ...), contiguous or channels_last")
    if x.dtype not in _DTYPES:
        raise errors.FastslimTypeError(f"batch_norm_act: Triton computes float32, bfloat16 and float16, not {x.dtype}")
    if not 0 <= activation < 5:
        raise errors.FastslimValueError(f"batch_norm_act: no activation {activation}")
    for name, t in others.items():
        if t is not None and (t.dtype != x.dtype or t.device != x.device or not dense_like(t, x)):
            raise errors.FastslimValueError(
                f"batch_norm_act: {name} must have x's shape, memory format, data type and device"
            )


def _active(vector: Tensor | None, x: Tensor, segments: Sequence[int], name: str) -> Tensor | None:
    """The active channels side by side: the vector itself, or a copy of its segments."""
    if vector is None:
        return None
    if vector.dim() != 1 or vector.device != x.device or vector.dtype not in (torch.float32, x.dtype):
        raise errors.FastslimValueError(
            f"batch_norm_act: {name} must be a vector on {x.device}, in float32 or {x.dtype}, "
            f"not {vector.dtype} on {vector.device}"
        )
    regions = _regions(vector, segments)
    total = sum(region.shape[0] for region in regions) if segments else min(x.shape[1], vector.shape[0])
    if total != x.shape[1]:
        raise errors.FastslimValueError(f"batch_norm_act: {total} channels of {name} are active, x has {x.shape[1]}")
    if segments:
        return torch.cat(regions)
    return vector if vector.stride(0) == 1 else vector.contiguous()


def _regions(vector: Tensor, segments: Sequence[int]) -> list[Tensor]:
    """Views of the segments; `narrow` refuses those that exceed the vector."""
    return [vector.narrow(0, start, count) for start, count in zip(segments[::2], segments[1::2], strict=True)]


def _scatter(updated: Tensor | None, vector: Tensor | None, segments: Sequence[int]) -> None:
    """Puts updated statistics back, if they are a copy; other channels keep every bit."""
    if vector is None or updated is vector:
        return
    if segments:
        torch._foreach_copy_(_regions(vector, segments), list(updated.split(list(segments[1::2]))))
    else:
        vector.copy_(updated)


def _device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: the tensor's."""
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()
