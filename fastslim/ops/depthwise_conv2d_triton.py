"""The Triton implementations of depthwise_conv2d's ops: one launch a segment, kernels imported at the first call."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from fastslim.ops import backend, depthwise_conv2d_schema
from fastslim.ops.depthwise_conv2d_library import memory_format
from fastslim.ops.segments import pieces, unflatten

_LIBRARY = torch.library.Library("fastslim", "FRAGMENT")
_BOUNDS = {0: (-float("inf"), float("inf")), 1: (0.0, float("inf")), 2: (0.0, 6.0)}  # of the prologue's activations


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, *conv: Any) -> Tensor:
    return _forward_bn(x, weight, bias, None, 0, *conv, False)[0]


def _forward_bn(
    x: Tensor, weight: Tensor, bias: Tensor | None, prologue: Tensor | None, prologue_activation: int, *call: Any
) -> tuple[Tensor, Tensor]:
    stride, padding, dilation, segments, multiplier, statistics = call
    channels, out = x.shape[1], []
    for i in (0, 1):
        out.append((x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2] - 1) - 1) // stride[i] + 1)
    y = torch.empty(
        (x.shape[0], channels * multiplier, *out), dtype=x.dtype, device=x.device, memory_format=memory_format(x)
    )
    chunks = depthwise_conv2d_schema.statistics_chunks(y.shape[0] * y.shape[2], channels)
    partials = torch.empty((chunks.chunks if statistics else 0, 3, channels), dtype=torch.float32, device=x.device)
    from fastslim.kernels.depthwise_conv2d import launch_depthwise_conv2d_fwd

    with _on(x):
        for start, offset, count in pieces(unflatten(segments), channels):
            launch_depthwise_conv2d_fwd(
                x.narrow(1, offset, count),
                weight.narrow(0, start, count),
                None if bias is None else bias.narrow(0, start, count),
                None if prologue is None else prologue.narrow(1, offset, count),
                y.narrow(1, offset, count),
                partials.narrow(2, offset, count) if statistics else None,
                channels,
                chunks.rows * y.shape[3],
                (stride[0], *padding),
                _BOUNDS[prologue_activation],
            )
    return y, partials


def _backward_input(
    grad_output: Tensor, weight: Tensor, input_size: list[int], channels_last: bool, *conv: Any
) -> Tensor:
    stride, padding, _, segments, _ = conv
    grad_x = torch.empty(
        tuple(input_size), dtype=grad_output.dtype, device=grad_output.device, memory_format=torch.channels_last
    )
    from fastslim.kernels.depthwise_conv2d import launch_depthwise_conv2d_bwd_input

    with _on(grad_x):
        for start, offset, count in pieces(unflatten(segments), grad_x.shape[1]):
            launch_depthwise_conv2d_bwd_input(
                grad_output.narrow(1, offset, count),
                weight.narrow(0, start, count),
                grad_x.narrow(1, offset, count),
                grad_x.shape[1],
                (stride[0], *padding),
            )
    return grad_x


def _backward_weight(
    grad_output: Tensor, x: Tensor, grad_weight: Tensor, grad_bias: Tensor | None, *conv_and_add: Any
) -> None:
    _backward_weight_bn(grad_output, x, grad_weight, grad_bias, None, 0, *conv_and_add)


def _backward_weight_bn(
    grad_output: Tensor,
    x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    prologue: Tensor | None,
    prologue_activation: int,
    *conv_and_add: Any,
) -> None:
    from fastslim.kernels.depthwise_conv2d_backward_weight import launch_depthwise_conv2d_bwd_weight

    stride, padding, _, segments, _, add_weight, add_bias = conv_and_add
    with _on(x):
        for start, offset, count in pieces(unflatten(segments), x.shape[1]):
            launch_depthwise_conv2d_bwd_weight(
                grad_output.narrow(1, offset, count),
                x.narrow(1, offset, count),
                grad_weight.narrow(0, start, count),
                None if grad_bias is None else grad_bias.narrow(0, start, count),
                None if prologue is None else prologue.narrow(1, offset, count),
                x.shape[1],
                (stride[0], *padding),
                _BOUNDS[prologue_activation],
                add_weight,
                add_bias,
            )


def register() -> None:
    """Defines the ops and registers these implementations."""
    depthwise_conv2d_schema.define("_triton")
    functions = (_forward, _backward_input, _backward_weight, _forward_bn, _backward_weight_bn)
    for name, function in zip(depthwise_conv2d_schema.SCHEMAS, functions, strict=True):
        _LIBRARY.impl(f"{name}_triton", function, "CUDA")
        if backend.interpreting():
            _LIBRARY.impl(f"{name}_triton", function, "CPU")
