"""Schemas, fakes and autograd of depthwise_conv2d, which all its compiled backends share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastslim.ops.depthwise_conv2d_library import memory_format

_CONV = "int[2] stride, int[2] padding, int[2] dilation, int[] segments, int multiplier"
_PROLOGUE = "Tensor? prologue, int prologue_activation"
_GRADIENTS = "Tensor grad_output, Tensor x, Tensor(a!) grad_weight, Tensor(b!)? grad_bias"
SCHEMAS = {
    "depthwise_conv2d": f"(Tensor x, Tensor weight, Tensor? bias, {_CONV}) -> Tensor",
    "depthwise_conv2d_backward_input": (
        f"(Tensor grad_output, Tensor weight, int[] input_size, bool channels_last, {_CONV}) -> Tensor"
    ),
    "depthwise_conv2d_backward_weight": f"({_GRADIENTS}, {_CONV}, bool add_weight, bool add_bias) -> ()",
    "depthwise_conv2d_bn": (
        f"(Tensor x, Tensor weight, Tensor? bias, {_PROLOGUE}, {_CONV}, bool statistics) -> (Tensor y, Tensor partials)"
    ),
    "depthwise_conv2d_bn_backward_weight": (
        f"({_GRADIENTS}, {_PROLOGUE}, {_CONV}, bool add_weight, bool add_bias) -> ()"
    ),
}
_LIBRARY = torch.library.Library("fastslim", "FRAGMENT")


class RowChunks(NamedTuple):
    """How the rows of an output are cut for its statistics.

    Attributes:
        chunks: how many.
        rows: image rows (n, h) of every chunk but the last, which has the rest.
    """

    chunks: int
    rows: int


def statistics_chunks(rows: int, channels: int) -> RowChunks:
    """How every backend cuts an output of `rows` = N * H_out image rows (csrc/cuda/depthwise_conv2d_vector.h)."""
    if rows == 0:
        return RowChunks(0, 1)
    wanted = max(1, 132 * 6 // -(-channels // 256))
    chunks = -(-rows // -(-rows // wanted))
    each = -(-rows // chunks)
    return RowChunks(-(-rows // each), each)


def define(suffix: str) -> None:
    """Defines the ops of a backend, their names ending in `suffix`."""
    fakes = (_fake, _fake_backward_input, _fake_backward_weight, _fake_bn, _fake_backward_weight)
    for (name, schema), fake in zip(SCHEMAS.items(), fakes, strict=True):
        _LIBRARY.define(f"{name}{suffix}{schema}")
        torch.library.register_fake(f"fastslim::{name}{suffix}", fake, lib=_LIBRARY)

    def backward(ctx, grad):
        return _op_backward(ctx, grad, suffix)

    torch.library.register_autograd(
        f"fastslim::depthwise_conv2d{suffix}", backward, setup_context=_setup_context, lib=_LIBRARY
    )


def _fake(x, weight, bias, stride, padding, dilation, segments, multiplier):
    size = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    return torch.empty(
        (x.shape[0], x.shape[1] * multiplier, *size), dtype=x.dtype, device=x.device, memory_format=memory_format(x)
    )


def _fake_backward_input(grad_output, weight, input_size, channels_last, *conv):
    dense = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(input_size), dtype=grad_output.dtype, device=grad_output.device, memory_format=dense)


def _fake_backward_weight(*arguments):
    return None


def _fake_bn(x, weight, bias, prologue, prologue_activation, *conv_and_statistics):
    *conv, statistics = conv_and_statistics
    y = _fake(x, weight, bias, *conv)
    chunks = statistics_chunks(y.shape[0] * y.shape[2], y.shape[1]).chunks if statistics else 0
    return y, x.new_empty((chunks, 3, y.shape[1]), dtype=statistics_dtype(x))


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Of sums, gradients of parameters and statistics of a computation on `x`."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _setup_context(ctx, inputs, output):
    x, weight, bias, *conv = inputs
    ctx.save_for_backward(x, weight)
    ctx.conv, ctx.bias_like = conv, bias


def _op_backward(ctx, grad, suffix: str):
    (x, weight), conv, bias = ctx.saved_tensors, ctx.conv, ctx.bias_like
    dense = memory_format(x)
    grad = grad.contiguous(memory_format=dense)
    gx = gw = gb = None
    if ctx.needs_input_grad[0]:
        of_input = getattr(torch.ops.fastslim, f"depthwise_conv2d_backward_input{suffix}")
        gx = of_input(grad, weight, x.shape, dense is torch.channels_last, *conv)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        gw = torch.zeros_like(weight, dtype=statistics_dtype(weight))
        gb = torch.zeros_like(bias, dtype=gw.dtype) if ctx.needs_input_grad[2] else None
        of_weight = getattr(torch.ops.fastslim, f"depthwise_conv2d_backward_weight{suffix}")
        of_weight(grad, x, gw, gb, *conv, False, False)
        gw, gb = gw.to(weight.dtype), None if gb is None else gb.to(weight.dtype)
    return gx, gw, gb, *[None] * 5
