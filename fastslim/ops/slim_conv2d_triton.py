"""`slim_conv2d` by the Triton kernels as opaque ops, channels_last, and fused with the batch norms around it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastslim.ops.segments import pieces, unflatten
from fastslim.ops.slim_conv2d_library import ConvShape, is_pointwise, slim_conv2d_reference
from fastslim.ops.slim_linear_triton import (
    CHUNK,
    multiply,
    multiply_backward_input,
    multiply_backward_weight,
    partial_statistics,
    recorded_tile,
    register_kernels,
    with_prologue,
)

_LIB = torch.library.Library("fastslim", "FRAGMENT")
_CONV = "int[] stride, int[] padding, int[] dilation, int c_out, int[] segments"
_LIB.define(f"slim_conv2d_triton(Tensor x, Tensor weight, Tensor? bias, {_CONV}) -> Tensor")
_LIB.define(
    f"slim_conv2d_backward_input_triton(Tensor grad, Tensor weight, int[] input_size, {_CONV}, "
    "Tensor? saved, int activation) -> Tensor"
)
_LIB.define(
    f"slim_conv2d_backward_weight_triton(Tensor grad, Tensor x, Tensor(a!) grad_weight, {_CONV}, bool add, "
    "Tensor? prologue, int activation) -> ()"
)
_LIB.define(
    f"slim_conv2d_bn_triton(Tensor x, Tensor weight, Tensor? bias, {_CONV}, Tensor? prologue, int activation) "
    "-> (Tensor, Tensor)"
)


def slim_conv2d_bn_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, shape: ConvShape, prologue: Tensor | None, activation: int
) -> tuple[Tensor, Tensor]:
    """The definition of `slim_conv2d_bn_triton`: the output, and partial statistics for `batch_norm_finalize`."""
    seen = with_prologue(x.permute(0, 2, 3, 1), prologue, activation).permute(0, 3, 1, 2)
    y = slim_conv2d_reference(seen, weight, bias, shape)
    return y, partial_statistics(_rows(y))


def _shape(stride, padding, dilation, c_out, segments) -> ConvShape:
    return ConvShape(tuple(stride), tuple(padding), tuple(dilation), 1, c_out, unflatten(segments))


def _rows(t: Tensor) -> Tensor:
    """(N, C, H, W) as (N * H * W, C): a view of channels_last."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def _image(like: Tensor, *size: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised channels_last memory, also where a dimension is 1, so that its rows are a view."""
    n, c, h, w = size
    return like.new_empty(n, h, w, c, dtype=dtype or like.dtype).permute(0, 3, 1, 2)


def _output(x: Tensor, weight: Tensor, shape: ConvShape) -> Tensor:
    return _image(x, x.shape[0], shape.c_out, *shape.output_size(x.shape, weight.shape))


def _compute(x, weight, bias, shape, prologue=None, activation=0, stats=None) -> Tensor:
    from fastslim.kernels.slim_conv2d import launch_slim_conv2d_fwd

    y, b = _output(x, weight, shape), None if bias is None else bias[: shape.c_out]
    active = weight[: shape.c_out]
    if is_pointwise(weight, shape):
        fused = dict(bias=b, prologue=prologue, activation=activation, stats=stats)
        multiply(_rows(x), active[:, :, 0, 0], _rows(y), shape.segments, **fused)
        return y
    parts = [part for part in pieces(shape.segments, x.shape[1]) if part[2]]
    sums = _image(y, *y.shape, dtype=torch.float32) if len(parts) > 1 else None
    tile = _tile(x, weight, shape, "forward", y)
    for index, (start, offset, count) in enumerate(parts):
        last = index == len(parts) - 1
        launch_slim_conv2d_fwd(
            x.narrow(1, offset, count),
            active.narrow(1, start, count),
            y if last else sums,
            stride=shape.stride,
            padding=shape.padding,
            dilation=shape.dilation,
            bias=b if last else None,
            prologue=None if prologue is None else prologue[:, offset : offset + count].contiguous(),
            activation=activation,
            addend=sums if index else None,
            stats=stats if last else None,
            recorded=tile,
        )
    return y


def _tile(x: Tensor, weight: Tensor, shape: ConvShape, direction: str, y: Tensor) -> str | None:
    """The recorded tile; `x` and `y` as of the forward."""
    rows = y.shape[0] * y.shape[2] * y.shape[3]
    kind = f"{direction} {weight.shape[2]}x{weight.shape[3]} s{shape.stride[0]}"
    return recorded_tile("slim_conv2d", x, kind, (rows, x.shape[1], y.shape[1]))


def _forward(x, weight, bias, *conv):
    return _compute(x, weight, bias, _shape(*conv))


def _forward_bn(x, weight, bias, stride, padding, dilation, c_out, segments, prologue, activation):
    shape = _shape(stride, padding, dilation, c_out, segments)
    h, w = shape.output_size(x.shape, weight.shape)
    stats = x.new_empty(-(-(x.shape[0] * h * w) // CHUNK), 3, c_out, dtype=torch.float32)
    return _compute(x, weight, bias, shape, prologue, activation, stats), stats


def _backward_input(grad, weight, input_size, stride, padding, dilation, c_out, segments, saved, activation):
    from fastslim.kernels.slim_conv2d import launch_slim_conv2d_fwd

    shape, dx, active = _shape(stride, padding, dilation, c_out, segments), _image(grad, *input_size), weight[:c_out]
    if is_pointwise(weight, shape):
        kept = None if saved is None else _rows(saved)
        multiply_backward_input(_rows(grad), active[:, :, 0, 0], _rows(dx), shape.segments, kept, activation)
        return dx
    tile = _tile(dx, weight, shape, "backward_input", grad)
    for start, offset, count in pieces(shape.segments, dx.shape[1]):
        launch_slim_conv2d_fwd(
            grad,
            active.narrow(1, start, count),
            dx.narrow(1, offset, count),
            stride=shape.stride,
            padding=shape.padding,
            dilation=shape.dilation,
            transposed=True,
            saved=None if saved is None else saved.narrow(1, offset, count),
            saved_activation=activation,
            recorded=tile,
        )
    return dx


def _backward_weight(grad, x, grad_weight, stride, padding, dilation, c_out, segments, add, prologue, activation):
    from fastslim.kernels.slim_conv2d import launch_slim_conv2d_bwd_weight

    shape, region = _shape(stride, padding, dilation, c_out, segments), grad_weight[:c_out]
    if is_pointwise(grad_weight, shape):
        fused = add, prologue, activation
        multiply_backward_weight(_rows(grad), _rows(x), region[:, :, 0, 0], shape.segments, *fused)
        return
    tile = _tile(x, grad_weight, shape, "backward_weight", grad)
    for start, offset, count in pieces(shape.segments, x.shape[1]):
        launch_slim_conv2d_bwd_weight(
            grad,
            x.narrow(1, offset, count),
            region.narrow(1, start, count),
            stride=shape.stride,
            padding=shape.padding,
            dilation=shape.dilation,
            add=add,
            prologue=None if prologue is None else prologue[:, offset : offset + count].contiguous(),
            activation=activation,
            recorded=tile,
        )


register_kernels(
    _LIB,
    slim_conv2d_triton=_forward,
    slim_conv2d_backward_input_triton=_backward_input,
    slim_conv2d_backward_weight_triton=_backward_weight,
    slim_conv2d_bn_triton=_forward_bn,
)


@torch.library.register_fake("fastslim::slim_conv2d_triton", lib=_LIB)
def _fake(x, weight, bias, *conv):
    return _output(x, weight, _shape(*conv))


@torch.library.register_fake("fastslim::slim_conv2d_bn_triton", lib=_LIB)
def _fake_bn(x, weight, bias, stride, padding, dilation, c_out, segments, prologue, activation):
    y = _output(x, weight, _shape(stride, padding, dilation, c_out, segments))
    chunks = (y.shape[0] * y.shape[2] * y.shape[3] + CHUNK - 1) // CHUNK
    return y, x.new_empty(chunks, 3, c_out, dtype=torch.float32)


@torch.library.register_fake("fastslim::slim_conv2d_backward_input_triton", lib=_LIB)
def _fake_backward_input(grad, weight, input_size, *others):
    return _image(grad, *input_size)


@torch.library.register_fake("fastslim::slim_conv2d_backward_weight_triton", lib=_LIB)
def _fake_backward_weight(*arguments):
    return None
