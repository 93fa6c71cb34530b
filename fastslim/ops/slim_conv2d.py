"""Convolution with `weight[:c_out, :c_in]`: dense ones by our kernels or the library, grouped ones by the library.

The weight is read in place through strides; inside a step its gradient goes straight into the
prefix of `param.grad`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastslim.ops import backend, slim_conv2d_cpp, slim_conv2d_triton  # noqa: F401  (define the ops of the kernels)
from fastslim.ops.apply_function import applier
from fastslim.ops.depthwise_conv2d import depthwise_conv2d
from fastslim.ops.once_differentiable import once_differentiable
from fastslim.ops.segments import Segments, check_segments, flatten, pieces, unflatten, width_error
from fastslim.ops.slim_conv2d_checks import check_input, grouped_c_out, pair
from fastslim.ops.slim_conv2d_choice import KERNELS, Chosen, chosen
from fastslim.ops.slim_conv2d_library import (
    ConvShape,
    conv_backward,
    conv_forward,
    dense_weight,
    slim_conv2d_reference,
)
from fastslim.ops.step_buffers import active_cast, active_packed, active_slot, autocast_dtype
from fastslim.ops.weight_cache import Prefix
from fastslim.ops.weight_gradient import GradientSink

_LIB = torch.library.Library("fastslim", "FRAGMENT")
_CONV = "int[] stride, int[] padding, int[] dilation, int groups, int c_out, int[] segments"
_LIB.define(f"slim_conv2d(Tensor x, Tensor weight, Tensor? bias, {_CONV}) -> Tensor")
_LIB.define(
    f"slim_conv2d_backward(Tensor grad, Tensor x, Tensor weight, {_CONV}, bool[] needed) -> (Tensor, Tensor, Tensor)"
)
_OPS = torch.ops.fastslim


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
    check_input(x, weight, bias)
    full_in = weight.shape[1] * groups
    segments = check_segments("slim_conv2d", segments, x.shape[1], full_in)
    stride, padding, dilation = pair(stride), pair(padding), pair(dilation)
    if groups > 1:
        c_out = grouped_c_out(x.shape[1], weight, groups, c_out, segments)
    elif c_out is None:
        c_out = weight.shape[0]
    elif not 0 < c_out <= weight.shape[0]:
        raise width_error("slim_conv2d", c_out, weight.shape[0], "channels")
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
    if backend.forced_backend() == "reference":
        return slim_conv2d_reference(x, weight, bias, shape)
    if torch.compiler.is_compiling():
        return _compiled(x, weight, bias, shape)
    if (dtype := autocast_dtype(x)) is not None:
        x = x.to(dtype)
    return _apply(x, weight, bias, shape, active_slot(weight), active_slot(bias))


def _compiled(x: Tensor, weight: Tensor, bias: Tensor | None, shape: ConvShape) -> Tensor:
    """The opaque op, which torch.compile can trace."""
    if (dtype := autocast_dtype(x)) is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return torch.ops.fastslim.slim_conv2d(x, weight, bias, *shape[:5], flatten(shape.segments))


class _SlimConv2d(torch.autograd.Function):
    """The hot path: a hand-written backward that writes into gradient slots."""

    @staticmethod
    def forward(ctx, x, weight, bias, shape, weight_slot, bias_slot):
        ctx.by = by = chosen(x, weight, shape)
        # C++ kernels read the parameter itself, whatever they compute in.
        of_cpp = "cpp" in (by.forward, by.backward_input)
        full = weight.detach() if of_cpp else active_cast(weight, x.dtype)
        b = None if bias is None else bias.detach() if by.forward == "cpp" else active_cast(bias, x.dtype)
        # The library's backward takes the weight as packed here; the kernels' the full one (Triton's either).
        ctx.is_full = by.backward_input in KERNELS
        w = None if ctx.is_full and by.forward in KERNELS else _packed(x, weight, full, shape)
        y = _kernel_forward(by, x, full, b, shape) if by.forward in KERNELS else conv_forward(x, w, b, shape)
        ctx.save_for_backward(x, full if ctx.is_full else w)
        ctx.shape, ctx.slots = shape, (weight_slot, bias_slot)
        ctx.weight_like, ctx.bias_like = weight, bias
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        shape, (weight_slot, bias_slot) = ctx.shape, ctx.slots
        weight, bias = ctx.weight_like, ctx.bias_like
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        sink = GradientSink(weight, weight_slot, _is_everything(x, weight, shape)) if needs_weight else None
        gx = _backward(grad, x, w, ctx.is_full, shape, ctx.by, needs_x, sink)
        bias_sink = GradientSink(bias, bias_slot, shape.c_out == bias.shape[0]) if needs_bias else None
        if bias_sink is not None:
            value = grad.sum((0, 2, 3))
            for start, offset, count in pieces(shape.filters(x.shape[1]), shape.c_out):
                bias_sink.add(value.narrow(0, offset, count), bias_sink.full.narrow(0, start, count))
        return gx, sink and sink.returned, bias_sink and bias_sink.returned, None, None, None


_apply = applier(_SlimConv2d)


def _packed(x: Tensor, weight: Tensor, full: Tensor, shape: ConvShape) -> Tensor:
    """The active weight as the library reads it: what the step's pass has packed, or packed now."""
    packed = active_packed(weight, x.dtype, Prefix(shape.c_out, x.shape[1], shape.segments))
    return dense_weight(x, full, shape) if packed is None else packed


def _is_everything(x: Tensor, weight: Tensor, shape: ConvShape) -> bool:
    """Whether every element of the weight takes part."""
    every_input = shape.segments is None and (shape.groups > 1 or x.shape[1] == weight.shape[1])
    return every_input and shape.c_out == weight.shape[0]


def _kernel_forward(by: Chosen, x: Tensor, weight: Tensor, bias: Tensor | None, shape: ConvShape) -> Tensor:
    op = _OPS.slim_conv2d_cpp if by.forward == "cpp" else _OPS.slim_conv2d_triton
    return op(x, weight, bias, *shape[:3], shape.c_out, flatten(shape.segments))


def _backward(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    is_full: bool,
    shape: ConvShape,
    by: Chosen,
    needs_x: bool,
    sink: GradientSink | None,
) -> Tensor | None:
    """The input gradient; the weight's goes to the sink. `w` is full or as :func:`dense_weight` made it."""
    library_x = needs_x and by.backward_input not in KERNELS
    library_weight = sink is not None and by.backward_weight not in KERNELS
    gx = None
    if library_x or library_weight:
        dense = dense_weight(x, w, shape) if is_full else w
        gx = conv_backward(grad, x, dense, shape, library_x, sink if library_weight else None)
    conv = (*shape[:3], shape.c_out)
    if needs_x and by.backward_input == "cpp":
        gx = _OPS.slim_conv2d_backward_input_cpp(grad, w, x.shape, *conv, flatten(shape.segments))
    elif needs_x and not library_x:
        cuts = shape.segments if is_full or w.dim() == 2 else None
        kernel_weight = w[:, :, None, None] if w.dim() == 2 else w
        gx = _OPS.slim_conv2d_backward_input_triton(grad, kernel_weight, x.shape, *conv, flatten(cuts), None, 0)
    if sink is not None and not library_weight:
        full, add = sink.target()
        if by.backward_weight == "cpp":
            _OPS.slim_conv2d_backward_weight_cpp(grad, x, full, *conv, flatten(shape.segments), add)
            return gx
        _OPS.slim_conv2d_backward_weight_triton(grad, x, full, *conv, flatten(shape.segments), add, None, 0)
    return gx


def _shape_of(stride, padding, dilation, groups, c_out, segments) -> ConvShape:
    return ConvShape(tuple(stride), tuple(padding), tuple(dilation), groups, c_out, unflatten(segments))


@torch.library.impl(_LIB, "slim_conv2d", "CompositeExplicitAutograd")
def _slim_conv2d_op(x, weight, bias, *conv):
    shape = _shape_of(*conv)
    by = chosen(x, weight, shape)
    if by.forward in KERNELS:
        return _kernel_forward(by, x, weight, bias, shape)
    return conv_forward(x, dense_weight(x, weight, shape), bias, shape)


@torch.library.impl(_LIB, "slim_conv2d_backward", "CompositeExplicitAutograd")
def _slim_conv2d_backward_op(grad, x, weight, stride, padding, dilation, groups, c_out, segments, needed):
    shape = _shape_of(stride, padding, dilation, groups, c_out, segments)
    sink = GradientSink(weight, None, _is_everything(x, weight, shape)) if needed[1] else None
    gx = _backward(grad, x, weight, True, shape, chosen(x, weight, shape), needed[0], sink)
    gb = grad.sum((0, 2, 3)) if needed[2] else grad.new_empty(0)
    return grad.new_empty(0) if gx is None else gx, grad.new_empty(0) if sink is None else sink.full, gb


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
