"""depthwise_conv2d between two batch normalisations: applies the one before, gathers statistics for the one behind.

The prologue is ``x' = activation((x - center) * scale + shift)``, computed while x is loaded and never rounded;
the padding is 0 after it. The statistics are of the rounded output, in chunks, as `batch_norm_finalize` merges
them (csrc/include/fastslim/batch_norm_act_cuda.h).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from fastslim.ops import backend, depthwise_conv2d_rule
from fastslim.ops.depthwise_conv2d_library import DepthwiseShape, Pair, depthwise_conv2d_reference, memory_format
from fastslim.ops.depthwise_conv2d_schema import statistics_chunks, statistics_dtype
from fastslim.ops.segments import pieces

CLAMPS = {0: (None, None), 1: (0.0, None), 2: (0.0, 6.0)}  # by position in batch_norm_act.ACTIVATIONS
_LIBRARY = torch.library.Library("fastslim", "FRAGMENT")


def depthwise_conv2d_bn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prologue: Tensor | None,
    prologue_activation: int,
    conv: DepthwiseShape,
    statistics: bool,
) -> tuple[Tensor, Tensor]:
    """The convolution of the prologue's output, and partial statistics of the result.

    Args:
        x: input ``(N, C, H, W)``; `C` active channels.
        weight: the full layer's weight, of x's dtype, any strides.
        bias: the full layer's bias or None.
        prologue: ``(3, C)`` center, scale and shift of the active channels, float32 (float64 for float64);
            None leaves x as it is.
        prologue_activation: 0 none, 1 relu, 2 relu6.
        conv: stride, padding, dilation, segments and multiplier.
        statistics: whether to gather them.

    Returns:
        The output, and partials ``(chunks, 3, C * multiplier)``: of each chunk of rows (n, h)
        (:func:`statistics_chunks`) its first value, sum(y - first) and sum((y - first)^2); no chunk without
        `statistics`.
    """
    chosen = _chosen("forward", x, weight, conv)
    if chosen == "reference":
        return depthwise_conv2d_bn_reference(x, weight, bias, prologue, prologue_activation, *conv, statistics)
    x = x.contiguous(memory_format=memory_format(x))
    return _op("depthwise_conv2d_bn", chosen)(x, weight, bias, prologue, prologue_activation, *conv, statistics)


def depthwise_conv2d_bn_backward_weight(
    grad_output: Tensor,
    x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    prologue: Tensor | None,
    prologue_activation: int,
    conv: DepthwiseShape,
    add_weight: bool,
    add_bias: bool,
) -> None:
    """Writes the active rows of the parameters' gradients, or adds to them; the prologue is computed again.

    The input gradient is `depthwise_conv2d_backward_input`: that of the prologue's output.
    """
    chosen = _chosen("backward_weight", x, grad_weight, conv)
    if chosen != "reference":
        dense = memory_format(x)
        grad_output, x = grad_output.contiguous(memory_format=dense), x.contiguous(memory_format=dense)
    call = grad_output, x, grad_weight, grad_bias, prologue, prologue_activation, *conv, add_weight, add_bias
    if chosen == "reference":
        depthwise_conv2d_bn_backward_weight_reference(*call)
    else:
        _op("depthwise_conv2d_bn_backward_weight", chosen)(*call)


def depthwise_conv2d_bn_reference(
    x, weight, bias, prologue, prologue_activation, stride, padding, dilation, segments, multiplier, statistics
) -> tuple[Tensor, Tensor]:
    """The definition in plain torch; sums in float32 (float64 for float64)."""
    conv = DepthwiseShape(tuple(stride), tuple(padding), tuple(dilation), tuple(segments), multiplier)
    wide = statistics_dtype(x)
    normal = prologue_reference(x, prologue, prologue_activation)
    y = depthwise_conv2d_reference(normal, weight.to(wide), None if bias is None else bias.to(wide), conv)
    y = y.to(x.dtype).contiguous(memory_format=memory_format(x))
    chunks = statistics_chunks(y.shape[0] * y.shape[2], y.shape[1]) if statistics else statistics_chunks(0, 1)
    partials = x.new_empty((chunks.chunks, 3, y.shape[1]), dtype=wide)
    values = y.permute(0, 2, 3, 1).reshape(-1, y.shape[1]).to(wide)
    for i, chunk in enumerate(values.split(chunks.rows * y.shape[3]) if chunks.chunks else ()):
        difference = chunk - chunk[0]
        partials[i] = torch.stack([chunk[0], difference.sum(0), difference.square().sum(0)])
    return y, partials


def depthwise_conv2d_bn_backward_weight_reference(
    grad_output,
    x,
    grad_weight,
    grad_bias,
    prologue,
    prologue_activation,
    stride,
    padding,
    dilation,
    segments,
    multiplier,
    add_weight,
    add_bias,
) -> None:
    """The definition in plain torch."""
    conv = DepthwiseShape(tuple(stride), tuple(padding), tuple(dilation), tuple(segments), multiplier)
    outputs, kernel = x.shape[1] * multiplier, grad_weight.shape[2:]
    normal, grad = prologue_reference(x, prologue, prologue_activation), grad_output.to(statistics_dtype(x))
    of_weight = conv2d_weight(normal, (outputs, 1, *kernel), grad, conv.stride, conv.padding, conv.dilation, x.shape[1])
    gradients = [(of_weight, grad_weight, add_weight)]
    if grad_bias is not None:
        gradients.append((grad.sum((0, 2, 3)), grad_bias, add_bias))
    for value, full, add in gradients:
        for start, offset, count in pieces(conv.rows, outputs):
            region, part = full.narrow(0, start, count), value.narrow(0, offset, count)
            region.add_(part) if add else region.copy_(part)


def prologue_reference(x: Tensor, prologue: Tensor | None, activation: int) -> Tensor:
    """The prologue's output, in float32 (float64 for float64)."""
    x = x.to(statistics_dtype(x))
    if prologue is None:
        return x
    center, scale, shift = prologue.to(x.dtype)[:, :, None, None]
    low, high = CLAMPS[activation]
    x = (x - center) * scale + shift
    return x if low is None else x.clamp(low, high)


def _rule(
    target: str,
    dtype: torch.dtype,
    direction: str = "forward",
    channels_last: bool = True,
    kernel: Pair = (3, 3),
    stride: Pair = (1, 1),
    dilation: Pair = (1, 1),
    multiplier: int = 1,
    segments: int = 1,
    channels: int = 0,
    pixels: int = 0,
) -> backend.Choice:
    if target == "cpu":
        return backend.Choice("reference", "a CPU has no fused kernel of ours")
    call = direction, channels_last, kernel, stride, dilation, multiplier, segments
    refusals = {name: _refuses(name, target, dtype, *call) for name in ("cuda", "triton")}
    kernels = tuple(name for name, reason in refusals.items() if reason is None)
    reasons = "; ".join(f"{name} {reason}" for name, reason in refusals.items())
    if not kernels:
        return backend.Choice("reference", reasons)
    return backend.gpu_choice(
        f"depthwise_conv2d_bn_{direction}",
        target,
        dtype,
        kernels,
        otherwise=backend.Choice("reference", "no kernel can run"),
        exact=("x".join(map(str, kernel)), "stride", "x".join(map(str, stride))),
        sizes=(channels, pixels),
    )


def _refuses(kernel_backend: str, target: str, dtype: torch.dtype, *call: Any) -> str | None:
    _, channels_last, kernel, stride, dilation, multiplier, *_ = call
    if kernel_backend in ("cuda", "triton") and (
        dtype == torch.float64
        or not depthwise_conv2d_rule.has_vectors(channels_last, kernel, stride, dilation, multiplier)
    ):
        return "computes channels_last, kernels of 3, 5 and 7, stride 1 and 2, at most 32 bits a value"
    return depthwise_conv2d_rule.refuses(kernel_backend, target, dtype, *call)


backend.register("depthwise_conv2d_bn", ("reference", "cuda", "triton"), _rule, _refuses)
_LIBRARY.impl("depthwise_conv2d_bn", depthwise_conv2d_bn_reference, "CPU")
_LIBRARY.impl("depthwise_conv2d_bn_backward_weight", depthwise_conv2d_bn_backward_weight_reference, "CPU")


def _chosen(direction: str, x: Tensor, weight: Tensor, conv: DepthwiseShape) -> str:
    return backend.choose(
        "depthwise_conv2d_bn",
        backend.target_of(x),
        x.dtype,
        direction,
        memory_format(x) is torch.channels_last,
        (weight.shape[2], weight.shape[3]),
        conv.stride,
        conv.dilation,
        conv.multiplier,
        max(1, len(conv.segments) // 2),
        x.shape[1],
        x.shape[0] * x.shape[2] * x.shape[3],
    ).backend


def _op(name: str, chosen: str) -> Callable[..., Any]:
    return getattr(torch.ops.fastslim, f"{name}_triton" if chosen == "triton" else name)
