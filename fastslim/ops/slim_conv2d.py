"""Convolution with `weight[:c_out, :c_in]`: dense and grouped through the library, depthwise by our kernels.

The weight is read in place through strides; inside a step its gradient goes straight into the
prefix of `param.grad`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fastslim import errors
from fastslim.ops import backend
from fastslim.ops.depthwise_conv2d import depthwise_conv2d
from fastslim.ops.segments import Segments, check_segments, flatten, pieces, unflatten
from fastslim.ops.slim_conv2d_library import (
    ConvShape,
    active_weight,
    conv_backward,
    conv_forward,
    is_matrix_product,
    memory_format,
    put,
    slim_conv2d_reference,
)
from fastslim.ops.step_buffers import GradientSlot, active_cast, active_slot, autocast_dtype

_LIB = torch.library.Library("fastslim", "FRAGMENT")
_CONV = "int[] stride, int[] padding, int[] dilation, int groups, int c_out, int[] segments"
_LIB.define(f"slim_conv2d(Tensor x, Tensor weight, Tensor? bias, {_CONV}) -> Tensor")
_LIB.define(
    f"slim_conv2d_backward(Tensor grad, Tensor x, Tensor weight, {_CONV}, bool[] needed) -> (Tensor, Tensor, Tensor)"
)


def _rule(target: str, dtype: torch.dtype) -> backend.Choice:
    return backend.Choice("library", "dense products are at the hardware's peak in oneDNN, MKL, cuDNN and cuBLAS")


backend.register("slim_conv2d", ("reference", "library"), _rule)


def slim_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    c_out: int | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """Convolves with the first `c_out` filters and the active input channels of `weight`, in place.

    Args:
        x: input ``(N, c_in, H, W)``; `c_in` active channels.
        weight: the full layer's weight ``(C_out, C_in / groups, kh, kw)``.
        bias: the full layer's bias ``(C_out,)`` or None.
        stride: as in :func:`torch.nn.functional.conv2d`.
        padding: zeros added on both sides, per spatial dimension.
        dilation: spacing between filter taps.
        groups: groups of the full layer. With more than one, a prefix of the *groups* is active and
            every group keeps its size.
        c_out: active output channels; all by default, and for grouped convolutions given by the input.
        segments: ``(start, count)`` input channels of the full layer that `x` holds, in order, when
            they are not simply the first `c_in`.

    Returns:
        ``(N, c_out, H_out, W_out)``, equal to ``F.conv2d(x, weight[:c_out, :c_in], bias[:c_out], ...)``.

    Raises:
        FastslimValueError: more channels than the layer has, or an input that does not fit `segments`.
        FastslimTypeError: integer input.
    """
    _check_input(x, weight)
    full_in = weight.shape[1] * groups
    segments = check_segments("slim_conv2d", segments, x.shape[1], full_in)
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    if groups > 1:
        c_out = _grouped_c_out(x.shape[1], weight, groups, c_out, segments)
    elif c_out is None:
        c_out = weight.shape[0]
    elif not 0 < c_out <= weight.shape[0]:
        raise errors.FastslimValueError(
            f"slim_conv2d: c_out={c_out} exceeds the layer's {weight.shape[0]} channels; choose 1 to {weight.shape[0]}"
        )
    if groups > 1 and weight.shape[1] == 1:
        multiplier = weight.shape[0] // groups
        return depthwise_conv2d(
            x,
            weight,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            segments=segments,
            multiplier=multiplier,
        )
    shape = ConvShape(stride, padding, dilation, groups, c_out, segments)
    if backend.choose("slim_conv2d", backend.target_of(x), x.dtype).backend == "reference":
        return slim_conv2d_reference(x, weight, bias, shape)
    if torch.compiler.is_compiling():
        return _compiled(x, weight, bias, shape)
    if (dtype := autocast_dtype(x)) is not None:
        x = x.to(dtype)
    return _SlimConv2d.apply(x, weight, bias, shape, active_slot(weight), active_slot(bias))


def _compiled(x: Tensor, weight: Tensor, bias: Tensor | None, shape: ConvShape) -> Tensor:
    """The opaque op, which torch.compile can trace."""
    if (dtype := autocast_dtype(x)) is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return torch.ops.fastslim.slim_conv2d(x, weight, bias, *shape[:5], flatten(shape.segments))


def _check_input(x: Tensor, weight: Tensor) -> None:
    if x.dim() != 4:
        raise errors.FastslimValueError(
            f"slim_conv2d: the input must be (N, C, H, W), got shape {tuple(x.shape)}; add the batch dimension?"
        )
    if not x.dtype.is_floating_point:
        raise errors.FastslimTypeError(
            f"slim_conv2d: the input is {x.dtype}; convert images first: images.float() / 255"
        )
    if x.device != weight.device:
        raise errors.FastslimValueError(
            f"slim_conv2d: input on {x.device}, weight on {weight.device}; move both to one device"
        )
    if x.dtype != weight.dtype and autocast_dtype(x) is None:
        raise errors.FastslimTypeError(
            f"slim_conv2d: input is {x.dtype}, weight is {weight.dtype}; convert one, or run under torch.autocast"
        )


def _grouped_c_out(c_in: int, weight: Tensor, groups: int, c_out: int | None, segments: Segments | None) -> int:
    size = weight.shape[1]
    if any(value % size for value in ([c_in] if segments is None else flatten(segments))):
        raise errors.FastslimValueError(
            f"slim_conv2d: a grouped convolution keeps whole groups of {size} input channels; "
            f"{c_in} active channels cut one"
        )
    expected = c_in // size * (weight.shape[0] // groups)
    if c_out not in (None, expected):
        raise errors.FastslimValueError(
            f"slim_conv2d: {c_in // size} of {groups} groups are active and give {expected} output channels, "
            f"not {c_out}; narrow or widen the layer before it"
        )
    return expected


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else cast("tuple[int, int]", tuple(value))


class _SlimConv2d(torch.autograd.Function):
    """The hot path: a hand-written backward that writes into gradient slots."""

    @staticmethod
    def forward(ctx, x, weight, bias, shape, weight_slot, bias_slot):
        b = None if bias is None else active_cast(bias, x.dtype)
        y, w = conv_forward(x, active_cast(weight, x.dtype), b, shape)
        ctx.save_for_backward(x, w)
        ctx.shape, ctx.slots = shape, (weight_slot, bias_slot)
        ctx.weight_like, ctx.bias_like = weight, bias
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        shape, (weight_slot, bias_slot) = ctx.shape, ctx.slots
        weight, c_in = ctx.weight_like, x.shape[1]
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        full, accumulate, gw, gb = None, False, None, None
        if needs_weight:
            everything = (
                shape.c_out == weight.shape[0]
                and shape.segments is None
                and (shape.groups > 1 or c_in == weight.shape[1])
            )
            if weight_slot is not None:
                full, accumulate = weight_slot.target(everything)
            else:
                full = gw = torch.empty_like(weight) if everything else torch.zeros_like(weight)
        gx = conv_backward(grad, x, w, shape, (needs_x, needs_weight), full, accumulate)
        if needs_bias:
            gb = _bias_gradient(grad, ctx.bias_like, shape, c_in, bias_slot)
        return gx, gw, gb, None, None, None


def _bias_gradient(grad: Tensor, bias: Tensor, shape: ConvShape, c_in: int, slot: GradientSlot | None) -> Tensor | None:
    value = grad.sum((0, 2, 3))
    everything = shape.c_out == bias.shape[0]
    if slot is not None:
        full, accumulate = slot.target(everything)
    else:
        full, accumulate = torch.zeros_like(bias), False
    for start, offset, count in pieces(shape.filters(c_in), shape.c_out):
        put(full.narrow(0, start, count), value.narrow(0, offset, count), accumulate)
    return None if slot is not None else full


def _shape_of(stride, padding, dilation, groups, c_out, segments) -> ConvShape:
    return ConvShape(tuple(stride), tuple(padding), tuple(dilation), groups, c_out, unflatten(segments))


@torch.library.impl(_LIB, "slim_conv2d", "CompositeExplicitAutograd")
def _slim_conv2d_op(x, weight, bias, *conv):
    return conv_forward(x, weight, bias, _shape_of(*conv))[0]


@torch.library.impl(_LIB, "slim_conv2d_backward", "CompositeExplicitAutograd")
def _slim_conv2d_backward_op(grad, x, weight, stride, padding, dilation, groups, c_out, segments, needed):
    shape = _shape_of(stride, padding, dilation, groups, c_out, segments)
    if is_matrix_product(x, weight, shape):
        w = weight[:c_out, :, 0, 0]
    else:
        w = active_weight(weight, shape, x.shape[1]).contiguous(memory_format=memory_format(x))
    gw = torch.zeros_like(weight) if needed[1] else grad.new_empty(0)
    gx = conv_backward(grad, x, w, shape, tuple(needed[:2]), gw)
    gb = grad.sum((0, 2, 3)) if needed[2] else grad.new_empty(0)
    return grad.new_empty(0) if gx is None else gx, gw, gb


@torch.library.register_fake("fastslim::slim_conv2d", lib=_LIB)
def _slim_conv2d_fake(x, weight, bias, stride, padding, dilation, groups, c_out, segments):
    shape = _shape_of(stride, padding, dilation, groups, c_out, segments)
    return slim_conv2d_reference(x, weight, bias, shape)


@torch.library.register_fake("fastslim::slim_conv2d_backward", lib=_LIB)
def _slim_conv2d_backward_fake(grad, x, weight, stride, padding, dilation, groups, c_out, segments, needed):
    empty = grad.new_empty(0)
    return (
        torch.empty_like(x) if needed[0] else empty,
        torch.empty_like(weight) if needed[1] else empty,
        grad.new_empty(c_out) if needed[2] else empty,
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias, *conv = inputs
    ctx.save_for_backward(x, weight)
    ctx.conv, ctx.bias_shape = conv, None if bias is None else bias.shape


def _op_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:3])
    gx, gw, gb = torch.ops.fastslim.slim_conv2d_backward(grad, x, weight, *ctx.conv, needed)
    if needed[2] and gb.shape != ctx.bias_shape:
        shape = _shape_of(*ctx.conv)
        parts = pieces(shape.filters(x.shape[1]), shape.c_out)
        full = gb.new_zeros(ctx.bias_shape)
        for start, offset, count in parts:
            full = full.slice_scatter(gb.narrow(0, offset, count), 0, start, start + count)
        gb = full
    return (*(g if need else None for g, need in zip((gx, gw, gb), needed, strict=True)), *[None] * 6)


torch.library.register_autograd("fastslim::slim_conv2d", _op_backward, setup_context=_setup_context, lib=_LIB)
