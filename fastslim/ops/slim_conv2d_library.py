"""The arithmetic of `slim_conv2d`: its definition, and the same through ATen on strided weight views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastslim.ops.segments import Segments, cut, pieces
from fastslim.ops.weight_gradient import GradientSink, add_product


class ConvShape(NamedTuple):
    """What a convolution computes besides its tensors; `groups` are the full layer's."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    c_out: int
    segments: Segments | None

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        """Height and width of the output of an input `size` and a kernel ``(..., kh, kw)``."""
        h, w = (
            (size[d] + 2 * self.padding[d] - self.dilation[d] * (kernel[d] - 1) - 1) // self.stride[d] + 1
            for d in (-2, -1)
        )
        return h, w

    def active_groups(self, c_in: int, weight: Tensor) -> int:
        """Groups that `c_in` channels fill; every group keeps its size."""
        return 1 if self.groups == 1 else c_in // weight.shape[1]

    def filters(self, c_in: int) -> Segments | None:
        """Segments of the filters of a grouped convolution; None for the first `c_out`."""
        if self.groups == 1 or self.segments is None:
            return None
        return tuple((start * self.c_out // c_in, count * self.c_out // c_in) for start, count in self.segments)


def slim_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None, shape: ConvShape) -> Tensor:
    """The definition: `F.conv2d` on the active slice of the weight."""
    c_in = x.shape[1]
    b = None if bias is None else cut(bias, 0, shape.filters(c_in), shape.c_out)
    groups = shape.active_groups(c_in, weight)
    return F.conv2d(x, active_weight(weight, shape, c_in), b, shape.stride, shape.padding, shape.dilation, groups)


def active_weight(weight: Tensor, shape: ConvShape, c_in: int) -> Tensor:
    """`weight[:c_out, :c_in]`; of a grouped convolution, the filters of the active groups."""
    if shape.groups > 1:
        return cut(weight, 0, shape.filters(c_in), shape.c_out)
    return cut(cut(weight, 0, None, shape.c_out), 1, shape.segments, c_in)


def _regions(full: Tensor, shape: ConvShape, c_in: int) -> list[tuple[Tensor, int, int, int]]:
    """The active regions of a weight-shaped tensor as (region, dim, offset, count) of the dense active weight."""
    if shape.groups > 1:
        return [
            (full.narrow(0, start, count), 0, offset, count)
            for start, offset, count in pieces(shape.filters(c_in), shape.c_out)
        ]
    rows = cut(full, 0, None, shape.c_out)
    return [(rows.narrow(1, start, count), 1, offset, count) for start, offset, count in pieces(shape.segments, c_in)]


def is_pointwise(weight: Tensor, shape: ConvShape) -> bool:
    """A dense 1x1 convolution that takes every pixel once: a matrix product of pixels."""
    return weight.shape[2:] == (1, 1) and (shape.groups, shape.stride, shape.padding) == (1, (1, 1), (0, 0))


def is_matrix_product(x: Tensor, weight: Tensor, shape: ConvShape) -> bool:
    """A 1x1 convolution over pixels that lie one after the other with their channels side by side."""
    return is_pointwise(weight, shape) and x.stride(1) == 1 and x.numel() > 0


def _pixels(t: Tensor) -> Tensor:
    """(N, C, H, W) as the matrix (N * H * W, C); a view when the channels lie side by side."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def dense_weight(x: Tensor, weight: Tensor, shape: ConvShape) -> Tensor:
    """The active weight as the library reads it: a strided matrix, or packed; a view at full width.

    Packed once here instead of by the library in every direction.
    """
    if is_matrix_product(x, weight, shape):
        return weight[: shape.c_out, :, 0, 0]
    return active_weight(weight, shape, x.shape[1]).contiguous(memory_format=memory_format(x))


def conv_forward(x: Tensor, w: Tensor, bias: Tensor | None, shape: ConvShape) -> Tensor:
    """The output; `w` is what :func:`dense_weight` returned."""
    c_in = x.shape[1]
    b = None if bias is None else cut(bias, 0, shape.filters(c_in), shape.c_out)
    if w.dim() == 4:
        groups = 1 if shape.groups == 1 else c_in // w.shape[1]
        return torch.ops.aten.convolution(x, w, b, shape.stride, shape.padding, shape.dilation, False, (0, 0), groups)
    # Strided views straight into the matrix product: 1.1-4 times oneDNN's 1x1 convolution on
    # 2 cores with AVX-512, forward and backward, and no packing of the weight.
    pixels = _pixels(x)
    # Returned itself: a view could not be changed in place, as by ReLU(inplace=True).
    result = torch.empty(
        (x.shape[0], shape.c_out, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    y = result.permute(0, 2, 3, 1).view(pixels.shape[0], shape.c_out)
    for start, offset, count in pieces(shape.segments, c_in):
        left, right = pixels.narrow(1, offset, count), w.narrow(1, start, count).t()
        if offset:
            y.addmm_(left, right)
        elif b is not None:
            torch.addmm(b, left, right, out=y)
        else:
            torch.mm(left, right, out=y)
    return result


def conv_backward(
    grad: Tensor, x: Tensor, w: Tensor, shape: ConvShape, needs_input: bool, sink: GradientSink | None
) -> Tensor | None:
    """The input gradient if needed; with a sink, the weight gradient goes there.

    `w` is what :func:`dense_weight` returned.
    """
    c_in = x.shape[1]
    if w.dim() == 2:
        pixels, grads = _pixels(x), _pixels(grad)
        if sink is not None:
            add_product(sink, grads, pixels, shape.segments)
        if not needs_input:
            return None
        gx = torch.empty_like(pixels)
        for start, offset, count in pieces(shape.segments, c_in):
            torch.mm(grads, w.narrow(1, start, count), out=gx.narrow(1, offset, count))
        return gx.view(x.shape[0], *x.shape[2:], c_in).permute(0, 3, 1, 2)
    groups = 1 if shape.groups == 1 else c_in // w.shape[1]
    needed = (needs_input, sink is not None, False)
    gx, gw, _ = torch.ops.aten.convolution_backward(
        grad, x, w, None, shape.stride, shape.padding, shape.dilation, False, (0, 0), groups, needed
    )
    if sink is not None:
        for region, dim, offset, count in _regions(sink.full, shape, c_in):
            sink.add(gw.narrow(dim, offset, count), region)
    return gx


def memory_format(x: Tensor) -> torch.memory_format:
    """The format to compute in: the input's."""
    return torch.channels_last if x.stride(1) == 1 and x.shape[1] > 1 else torch.contiguous_format
