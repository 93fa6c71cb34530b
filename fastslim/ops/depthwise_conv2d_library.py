"""What `depthwise_conv2d` computes, as data: its definition, the argument check, and the same through ATen."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastslim import errors
from fastslim.ops.segments import Segments, check_devices, check_segments, cut, flatten, scaled, unflatten
from fastslim.ops.step_buffers import autocast_dtype

Pair = tuple[int, int]


class DepthwiseShape(NamedTuple):
    """What a depthwise convolution computes besides its tensors; the order of the op schemas."""

    stride: Pair
    padding: Pair
    dilation: Pair
    segments: tuple[int, ...]
    multiplier: int

    @property
    def rows(self) -> Segments | None:
        """The active rows of the weight; None for the first ones."""
        return scaled(unflatten(self.segments), self.multiplier)


def depthwise_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None, conv: DepthwiseShape) -> Tensor:
    """The definition: `F.conv2d` on the active rows of the weight."""
    channels = x.shape[1]
    w = cut(weight, 0, conv.rows, channels * conv.multiplier)
    b = None if bias is None else cut(bias, 0, conv.rows, channels * conv.multiplier)
    return F.conv2d(x, w, b, conv.stride, conv.padding, conv.dilation, channels)


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels_last if the channels lie side by side; one channel or one pixel counts as NCHW."""
    if x.is_contiguous() or x.stride(1) != 1 or x.shape[1] == 1:
        return torch.contiguous_format
    return torch.channels_last


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def check_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Pair,
    padding: int | Pair,
    dilation: int | Pair,
    segments: Segments | None,
    multiplier: int,
) -> DepthwiseShape:
    """Friendly errors; returns the shape with prefix segments dropped."""
    name = "depthwise_conv2d"
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    if x.dim() != 4:
        raise errors.FastslimValueError(
            f"{name}: the input must be (N, C, H, W), got shape {tuple(x.shape)}; add the batch dimension?"
        )
    if weight.dim() != 4 or weight.shape[1] != 1:
        raise errors.FastslimValueError(
            f"{name}: the weight must be (C * multiplier, 1, kh, kw), got {tuple(weight.shape)}; "
            "use slim_conv2d for other convolutions"
        )
    if not x.dtype.is_floating_point:
        raise errors.FastslimTypeError(f"{name}: the input is {x.dtype}; convert images first: images.float() / 255")
    check_devices(name, x, weight, bias)
    if x.dtype != weight.dtype and autocast_dtype(x) is None:
        raise errors.FastslimTypeError(
            f"{name}: input is {x.dtype}, weight is {weight.dtype}; convert one, or run under torch.autocast"
        )
    if multiplier < 1 or weight.shape[0] % multiplier:
        raise errors.FastslimValueError(
            f"{name}: multiplier={multiplier} does not divide the weight's {weight.shape[0]} filters"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise errors.FastslimValueError(
            f"{name}: bias has shape {tuple(bias.shape)}, but the layer has {weight.shape[0]} filters; "
            "pass the full layer's bias"
        )
    segments = check_segments(name, segments, x.shape[1], weight.shape[0] // multiplier)
    for what, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if min(value) < least:
            raise errors.FastslimValueError(f"{name}: {what}={value} must be one or two integers >= {least}")
    for i in (0, 1):
        reach = dilation[i] * (weight.shape[2 + i] - 1) + 1
        if x.shape[2 + i] + 2 * padding[i] < reach or x.shape[2 + i] == 0:
            raise errors.FastslimValueError(
                f"{name}: a {tuple(weight.shape[2:])} kernel with dilation {dilation} does not fit the "
                f"{tuple(x.shape[2:])} input; padding {padding} is too small"
            )
    return DepthwiseShape(stride, padding, dilation, tuple(flatten(segments)), multiplier)


def library_forward(x: Tensor, w: Tensor, b: Tensor | None, conv: DepthwiseShape) -> Tensor:
    """The output, by ATen on the active rows."""
    rows, active = conv.rows, x.shape[1] * conv.multiplier
    w, b = cut(w, 0, rows, active), None if b is None else cut(b, 0, rows, active)
    return torch.ops.aten.convolution(x, w, b, conv.stride, conv.padding, conv.dilation, False, (0, 0), x.shape[1])


def library_backward(
    grad: Tensor, x: Tensor, w: Tensor, conv: DepthwiseShape, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input and of the active rows, those that are needed."""
    w = cut(w, 0, conv.rows, x.shape[1] * conv.multiplier)
    gx, gw, _ = torch.ops.aten.convolution_backward(
        grad, x, w, None, conv.stride, conv.padding, conv.dilation, False, (0, 0), x.shape[1], (*needed, False)
    )
    return gx, gw
