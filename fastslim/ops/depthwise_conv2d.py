"""Depthwise convolution of the active channels of a slimmable layer, its weight read in place.

Forward, input and weight gradient each go to the fastest of our kernels and the library (depthwise_conv2d_rule.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastslim.ops import backend, depthwise_conv2d_schema, depthwise_conv2d_triton
from fastslim.ops.apply_function import applier
from fastslim.ops.depthwise_conv2d_library import (
    DepthwiseShape,
    Pair,
    check_arguments,
    depthwise_conv2d_reference,
    library_backward,
    library_forward,
    memory_format,
)
from fastslim.ops.depthwise_conv2d_rule import refuses, rule
from fastslim.ops.once_differentiable import once_differentiable
from fastslim.ops.segments import Segments, pieces
from fastslim.ops.step_buffers import GradientSlot, active_cast, active_slot, autocast_dtype

depthwise_conv2d_schema.define("")
depthwise_conv2d_triton.register()
backend.register("depthwise_conv2d", ("reference", "library", "cpp", "cuda", "triton"), rule, refuses)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    segments: Segments | None = None,
    multiplier: int = 1,
) -> Tensor:
    """Convolves every active channel with its own `multiplier` filters of the full layer's weight.

    Args:
        x: input ``(N, C, H, W)``, NCHW or channels_last; `C` active channels.
        weight: the full layer's weight ``(C_full * multiplier, 1, kh, kw)``, any strides.
        bias: the full layer's bias ``(C_full * multiplier,)`` or None.
        stride: as in :func:`torch.nn.functional.conv2d`.
        padding: zeros added on both sides, per spatial dimension.
        dilation: spacing between filter taps.
        segments: ``(start, count)`` channel ranges of the full layer that are the input's channels, in
            order; None for the first `C`.
        multiplier: filters per channel.

    Returns:
        ``(N, C * multiplier, H_out, W_out)`` in the memory format of `x`, equal to
        ``F.conv2d(x, weight[:C * multiplier], bias[:C * multiplier], ..., groups=C)``.

    Raises:
        FastslimValueError: more channels than the layer has, segments that do not fit the input, or a
            kernel larger than the padded input.
        FastslimTypeError: integer input, or a dtype other than the weight's outside autocast.
    """
    conv = check_arguments(x, weight, bias, stride, padding, dilation, segments, multiplier)
    if _chosen("forward", x, weight, conv) == "reference":
        return depthwise_conv2d_reference(x, weight, bias, conv)
    if (dtype := autocast_dtype(x)) is not None:
        x = x.to(dtype)
    if torch.compiler.is_compiling():
        w, b = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        chosen = _chosen("forward", x, w, conv)
        if chosen == "library" and x.device.type != "cpu":
            return depthwise_conv2d_reference(x, w, b, conv)
        return _op("depthwise_conv2d", chosen)(_dense(x), w, b, *conv)
    return _apply(x, weight, bias, conv, active_slot(weight), active_slot(bias))


def _chosen(direction: str, x: Tensor, weight: Tensor, conv: DepthwiseShape) -> str:
    """The backend of one direction."""
    kernel = (weight.shape[2], weight.shape[3])
    return backend.choose(
        "depthwise_conv2d",
        backend.target_of(x),
        x.dtype,
        direction,
        memory_format(x) is torch.channels_last,
        kernel,
        conv.stride,
        conv.dilation,
        conv.multiplier,
        max(1, len(conv.segments) // 2),
        x.shape[1],
        x.shape[0] * x.shape[2] * x.shape[3],
    ).backend


def _op(name: str, chosen: str) -> Callable[..., Any]:
    """The op of a backend: torch tells the CPU's and CUDA's kernels apart, Triton's have a name of their own."""
    return getattr(torch.ops.fastslim, f"{name}_triton" if chosen == "triton" else name)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=memory_format(x))


class _DepthwiseConv2d(torch.autograd.Function):
    """The hot path: a hand-written backward that writes into gradient slots."""

    @staticmethod
    def forward(ctx, x, weight, bias, conv, weight_slot, bias_slot):
        x, w = _dense(x), active_cast(weight, x.dtype)
        b = None if bias is None else active_cast(bias, x.dtype)
        ctx.save_for_backward(x, w)
        ctx.conv, ctx.slots, ctx.parameters = conv, (weight_slot, bias_slot), (weight, bias)
        chosen = _chosen("forward", x, w, conv)
        if chosen == "library":
            return library_forward(x, w, b, conv)
        # The op's own autograd formula, for torch.compile, would only be looked up and left out again.
        with torch._C._AutoDispatchBelowAutograd():
            return _op("depthwise_conv2d", chosen)(x, w, b, *conv)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x, w), conv = ctx.saved_tensors, ctx.conv
        (weight, bias), (weight_slot, bias_slot) = ctx.parameters, ctx.slots
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad = grad.contiguous(memory_format=memory_format(x))
        for_x = _chosen("backward_input", x, w, conv) if needs_x else ""
        for_weight = _chosen("backward_weight", x, w, conv) if needs_weight else ""
        library_x, library_weight = for_x == "library", for_weight == "library"
        gx = dw = gw = gb = None
        if library_x or library_weight:
            gx, dw = library_backward(grad, x, w, conv, (library_x, library_weight))
        if needs_x and gx is None:
            channels_last = memory_format(x) is torch.channels_last
            gx = _op("depthwise_conv2d_backward_input", for_x)(grad, w, x.shape, channels_last, *conv)
        if needs_weight and dw is None:
            with_bias = bias if needs_bias else None
            op = _op("depthwise_conv2d_backward_weight", for_weight)
            gw, gb = _kernel_backward_weight(op, grad, x, weight, with_bias, weight_slot, bias_slot, conv)
        elif dw is not None:
            gw = _put_rows(weight, weight_slot, dw, conv.rows)
        if needs_bias and (dw is not None or not needs_weight):
            gb = _put_rows(bias, bias_slot, grad.sum((0, 2, 3)), conv.rows)
        return gx, gw, gb, None, None, None


_apply = applier(_DepthwiseConv2d)


def _kernel_backward_weight(
    op: Callable[..., None],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_slot: GradientSlot | None,
    bias_slot: GradientSlot | None,
    conv: DepthwiseShape,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias; None for what went into a slot, or was not asked for."""
    everything = x.shape[1] * conv.multiplier == weight.shape[0]
    gw, add_weight = _target(weight, weight_slot, everything)
    gb, add_bias = (None, False) if bias is None else _target(bias, bias_slot, everything)
    op(grad, x, gw, gb, *conv, add_weight, add_bias)
    return (
        _deliver(weight, weight_slot, gw),
        None if bias is None or gb is None else _deliver(bias, bias_slot, gb),
    )


def _target(parameter: Tensor, slot: GradientSlot | None, everything: bool) -> tuple[Tensor, bool]:
    """Where the kernel writes (the slot itself if it has the kernel's dtype), and whether it adds."""
    dtype = depthwise_conv2d_schema.statistics_dtype(parameter)
    if slot is not None and slot.view.dtype == dtype:
        return slot.target(everything)
    make = torch.empty_like if everything else torch.zeros_like
    return make(parameter, dtype=dtype), False


def _deliver(parameter: Tensor, slot: GradientSlot | None, gradient: Tensor) -> Tensor | None:
    """A full-size gradient, handed to the slot unless it is the slot, or returned in the parameter's dtype."""
    if slot is None:
        return gradient.to(parameter.dtype)
    if gradient is not slot.view:
        slot.add(gradient, slot.view, region_full=True)
    return None


def _put_rows(parameter: Tensor, slot: GradientSlot | None, value: Tensor, rows: Segments | None) -> Tensor | None:
    """Puts the gradient of the active rows into the slot, or into a full-size gradient."""
    everything = value.shape[0] == parameter.shape[0]
    if slot is not None:
        full, add = slot.target(everything)
    else:
        full, add = (torch.empty_like if everything else torch.zeros_like)(parameter), False
    for start, offset, count in pieces(rows, value.shape[0]):
        region, part = full.narrow(0, start, count), value.narrow(0, offset, count)
        region.add_(part) if add else region.copy_(part)
    return None if slot is not None else full
