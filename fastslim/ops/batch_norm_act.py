"""Batch normalisation, residual add and activation in one op: y = act(bn(x) + residual), forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastslim import errors
from fastslim.ops import backend, batch_norm_act_triton
from fastslim.ops.apply_function import applier
from fastslim.ops.batch_norm_act_checks import check_arguments
from fastslim.ops.batch_norm_act_schema import define
from fastslim.ops.once_differentiable import once_differentiable
from fastslim.ops.segments import Segments, check_segments, cut, flatten, pieces
from fastslim.ops.step_buffers import GradientSlot, active_slot

_REFERENCE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}
ACTIVATIONS = tuple(_REFERENCE)  # the kernels know them by their position
MASKED_BY_OUTPUT = (1, 2)  # relu, relu6: act'(z) can be told from y
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SEGMENTS = 64  # the CUDA kernels take them by value (csrc/include/fastslim/batch_norm_act_cuda.h)

define("")
batch_norm_act_triton.register()


def _rule(
    target: str,
    dtype: torch.dtype,
    channels_last: bool = True,
    values: int = 0,
    channels: int = 0,
    segments: int = 1,
) -> backend.Choice:
    """`values`: of a channel, the batch times the pixels; `segments`: how many."""
    if target == "cpu":
        if dtype not in _CPU_DTYPES:
            return backend.Choice("reference", f"the kernel computes float32, bfloat16 and float64, not {dtype}")
        return backend.Choice("cpp", "normalisation, residual and activation in one pass, forward and backward")
    call = dtype, channels_last, values, channels, segments
    refusals = {kernel: _refuses(kernel, target, *call) for kernel in ("cuda", "triton")}
    kernels = tuple(kernel for kernel, reason in refusals.items() if reason is None)
    if not kernels:
        return backend.Choice("reference", "; ".join(f"{kernel} {reason}" for kernel, reason in refusals.items()))
    return backend.gpu_choice(
        "batch_norm_act",
        target,
        dtype,
        kernels,
        otherwise=backend.Choice("reference", "no kernel can run"),
        exact=("channels_last" if channels_last else "contiguous",),
        sizes=(values, channels),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuses(
    kernel: str,
    target: str,
    dtype: torch.dtype,
    channels_last: bool = True,
    values: int = 0,
    channels: int = 0,
    segments: int = 1,
) -> str | None:
    """Why a backend cannot compute a call, or None."""
    dtypes = {"cpp": _CPU_DTYPES, "cuda": _CUDA_DTYPES, "triton": _TRITON_DTYPES}.get(kernel, (dtype,))
    if dtype not in dtypes:
        return f"computes {', '.join(map(_name, dtypes))}, not {_name(dtype)}"
    if kernel == "triton" and target == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter is wrong in bfloat16"
    if kernel == "cuda" and segments > MAX_SEGMENTS:
        return f"takes at most {MAX_SEGMENTS} segments, not {segments}"
    return None


backend.register("batch_norm_act", ("reference", "cpp", "cuda", "triton"), _rule, _refuses)


def batch_norm_act_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "none",
    residual: Tensor | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """The definition in plain torch: `F.batch_norm` on the active channels, the add, the activation."""
    channels = x.shape[1]
    weight, bias, mean, var = (
        None if vector is None else cut(vector, 0, segments, channels)
        for vector in (weight, bias, running_mean, running_var)
    )
    y = F.batch_norm(x, mean, var, weight, bias, training or mean is None, momentum, eps)
    if training and segments is not None:
        for full, updated in ((running_mean, mean), (running_var, var)):
            if full is not None and updated is not None:
                for start, offset, count in pieces(segments, channels):
                    full[start : start + count] = updated[offset : offset + count]
    return _REFERENCE[activation](y if residual is None else y + residual)


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "none",
    residual: Tensor | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """Normalises the active channels, adds the residual, applies the activation (Ioffe & Szegedy 2015).

    Args:
        x: ``(N, C)`` or ``(N, C, ...)`` with `C` active channels, contiguous or channels_last.
        weight: the full layer's scale, or None for 1.
        bias: the full layer's shift, or None for 0.
        running_mean: the full layer's; None: statistics of the batch are used in evaluation too.
        running_var: as `running_mean`.
        training: normalise by the batch and update the running statistics of the active channels in
            place (unbiased variance); other channels keep every bit.
        momentum: share of the batch in the running statistics.
        eps: added to the variance.
        activation: one of :data:`ACTIVATIONS`, as in `torch.nn.functional`.
        residual: added before the activation; of x's shape.
        segments: ``(start, count)`` channels of the full layer that `x` holds, in order, when they
            are not simply the first `C`.

    Returns:
        A tensor like `x`.

    Raises:
        FastslimValueError: an unknown activation, more channels than the layer has, shapes that do
            not fit, or one value per channel in training.
        FastslimTypeError: an integer input, or parameters whose data type does not go with x's.
    """
    if activation not in _REFERENCE:
        raise errors.FastslimValueError(
            f"batch_norm_act: no activation {activation!r}: {errors.nearest(activation, ACTIVATIONS)}"
        )
    check_arguments(x, (weight, bias, running_mean, running_var), residual)
    full = next((v for v in (weight, bias, running_mean, running_var) if v is not None), None)
    segments = check_segments("batch_norm_act", segments, x.shape[1], x.shape[1] if full is None else full.shape[0])
    batch_statistics = training or running_mean is None
    if batch_statistics and x.numel() == x.shape[1]:
        raise errors.FastslimValueError(
            f"batch_norm_act: expected more than 1 value per channel in training, got input {tuple(x.shape)}; "
            "use a larger batch (drop_last=True in the loader) or larger images, or call .eval()"
        )
    if residual is not None and residual.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    chosen = backend.choose(
        "batch_norm_act", backend.target_of(x), x.dtype, x.stride(1) == 1, x.numel() // max(1, x.shape[1]),
        x.shape[1], len(segments or (0,)),
    ).backend  # fmt: skip
    if chosen == "reference":
        return batch_norm_act_reference(
            x, weight, bias, running_mean, running_var, training=training, momentum=momentum, eps=eps,
            activation=activation, residual=residual, segments=segments,
        )  # fmt: skip
    x = _dense(x)
    if residual is not None:
        residual = dense_like(residual, x)
    if batch_statistics and not training:
        running_mean = running_var = None
    options = _Options(batch_statistics, momentum, eps, ACTIVATIONS.index(activation), flatten(segments))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual)):
        slots = active_slot(weight), active_slot(bias)
        return _apply(x, weight, bias, running_mean, running_var, residual, options, segments, slots, chosen)
    return _op("batch_norm_act", chosen)(x, weight, bias, running_mean, running_var, residual, *options)[0]


def _op(name: str, chosen: str) -> Callable[..., Any]:
    """The op of a backend: torch tells the CPU's and CUDA's kernels apart, Triton's have a name of their own."""
    return getattr(torch.ops.fastslim, f"{name}_triton" if chosen == "triton" else name)


class _Options(NamedTuple):
    training: bool
    momentum: float
    eps: float
    activation: int
    segments: list[int]


class _Fused(torch.autograd.Function):
    """Keeps x and C-sized statistics, and with a residual y (relu, relu6) or the residual (silu, hardswish)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        residual: Tensor | None,
        options: _Options,
        segments: Segments | None,
        slots: tuple[GradientSlot | None, GradientSlot | None],
        chosen: str,
    ) -> Tensor:
        op = _op("batch_norm_act", chosen)
        y, stats = op(x, weight, bias, running_mean, running_var, residual, *options)
        extra = None
        if residual is not None and options.activation:
            extra = y if options.activation in MASKED_BY_OUTPUT else residual
        ctx.options, ctx.segments, ctx.slots, ctx.chosen = options, segments, slots, chosen
        ctx.save_for_backward(x, extra, stats, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, extra, stats, weight, bias = ctx.saved_tensors
        _, need_weight, need_bias, _, _, need_residual, *_ = ctx.needs_input_grad
        options = ctx.options
        dy = dense_like(dy, x)
        want_residual = need_residual and extra is not None
        in_place = ctx.chosen == "cpp" and need_weight and need_bias and weight.dtype != torch.bfloat16
        if in_place and None not in ctx.slots:
            everything = x.shape[1] == weight.shape[0]
            dx, dresidual = torch.ops.fastslim.batch_norm_act_backward_into(
                dy, x, extra, stats, weight, bias, options.training, options.activation, want_residual,
                options.segments, *ctx.slots[0].target(everything), *ctx.slots[1].target(everything),
            )  # fmt: skip
            residual = None if not need_residual else dresidual if want_residual else dy
            return dx, None, None, None, None, residual, None, None, None, None
        dx, dresidual, dweight, dbias = _op("batch_norm_act_backward", ctx.chosen)(
            dy, x, extra, stats, weight, bias, options.training, options.activation,
            want_residual, need_weight or need_bias, options.segments,
        )  # fmt: skip
        dweight = _deliver(dweight, weight, ctx.slots[0], ctx.segments) if need_weight else None
        dbias = _deliver(dbias, bias, ctx.slots[1], ctx.segments) if need_bias else None
        if not need_residual:
            dresidual = None
        elif extra is None:  # no activation: the residual's gradient is dy itself
            dresidual = dy
        return dx, dweight, dbias, None, None, dresidual, None, None, None, None


_apply = applier(_Fused)


def _deliver(
    gradient: Tensor, parameter: Tensor, slot: GradientSlot | None, segments: Segments | None
) -> Tensor | None:
    """Puts the active channels' gradient into the step's buffer, or makes the full-size gradient."""
    active, full = gradient.shape[0], parameter.shape[0]
    if slot is None:
        if active == full:
            return gradient.to(parameter.dtype)
        result = torch.zeros_like(parameter)
        for start, offset, count in pieces(segments, active):
            result[start : start + count] = gradient[offset : offset + count]
        return result
    for start, offset, count in pieces(segments, active):
        slot.add(gradient[offset : offset + count], slot.view[start : start + count], active == full)
    return None


def _dense(x: Tensor) -> Tensor:
    """The same tensor if the channels are the slowest or fastest dimension of dense memory, else a copy that is."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    if x.stride(1) == 1:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


def dense_like(t: Tensor, x: Tensor) -> Tensor:
    """The tensor `t` in the memory format of `x`, which is dense."""
    if t.stride() == x.stride():
        return t
    return t.contiguous() if x.is_contiguous() else t.movedim(1, -1).contiguous().movedim(-1, 1)
