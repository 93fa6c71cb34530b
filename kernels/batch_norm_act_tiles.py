"""What the kernels of batch_norm_act share: tiles of an activation tensor, coefficients, activations.

Memory is [outer, channels, inner]. channels_last and (N, C) have inner = 1: rows of channels, a program owns a block
of columns. NCHW has planes: a program owns one channel, its tiles are [images, pixels].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # values: 16 a thread, so that sums and a tile's values stay in 64 registers
NUM_WARPS = 8
PROGRAMS = 512  # of a reduction: 4 on each of an H200's 132 multiprocessors, all resident at once
RELU = tl.constexpr(1)
RELU6 = tl.constexpr(2)
SILU = tl.constexpr(3)
HARDSWISH = tl.constexpr(4)


class Tiling(NamedTuple):
    """How a tensor is cut; depends on its shape only, so that results repeat bit for bit.

    Attributes:
        outer: rows, or images.
        channels: of the tensor, or the most it can have when the width lies in device memory.
        inner: pixels of a plane, 1 for rows.
        width: int32 in device memory with the number of channels, or None.
        planes: NCHW.
        aligned: rows start at a multiple of 8 values.
        rows: of a tile.
        cols: of a tile.
    """

    outer: int
    channels: int
    inner: int
    width: Tensor | None
    planes: bool
    aligned: bool
    rows: int
    cols: int

    @property
    def blocks(self) -> int:
        """Blocks of channels, each the work of a program of its own."""
        return self.channels if self.planes else triton.cdiv(self.channels, self.cols)

    @property
    def tiles(self) -> int:
        """Tiles of a block of channels."""
        return triton.cdiv(self.outer, self.rows) * (triton.cdiv(self.inner, self.cols) if self.planes else 1)

    @property
    def chunks(self) -> int:
        """Partial sums of a channel."""
        return min(self.tiles, max(1, PROGRAMS // self.blocks))

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that every kernel over tiles takes."""
        return {
            "outer": self.outer, "channels": self.channels, "inner": self.inner, "width": self.width,
            "blocks": self.blocks, "tiles": self.tiles,
            "PLANES": self.planes, "ALIGNED": self.aligned, "ROWS": self.rows, "COLS": self.cols,
            "num_warps": NUM_WARPS,
        }  # fmt: skip


def tiling_of(x: Tensor, width: Tensor | None = None, width_multiple: int = 1) -> Tiling:
    """The tiles of a dense tensor ``(N, C, ...)``; see the launchers for `width`."""
    outer, channels, inner = x.shape[0], x.shape[1], x[0, 0].numel() if x.numel() else 1
    planes = inner > 1 and x.is_contiguous()
    if not planes:
        outer, inner = outer * inner, 1
    multiple = inner if planes else channels if width is None else width_multiple
    cols = _block(inner, 1024) if planes else _block(channels, 128)
    return Tiling(outer, channels, inner, width, planes, multiple % 8 == 0, TILE // cols, cols)


def is_dense(x: Tensor) -> bool:
    """Whether the kernels can read the tensor: channels are its slowest (after N) or its fastest dimension."""
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def dense_like(t: Tensor, x: Tensor) -> bool:
    """Whether `t` has the shape and the memory format of `x`, which is dense."""
    return t.shape == x.shape and (t.is_contiguous() if x.is_contiguous() else t.movedim(1, -1).is_contiguous())


def accumulators(*shape: int, like: Tensor) -> Tensor:
    """Uninitialised float32 beside `like`."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _block(size: int, largest: int) -> int:
    """The largest power of two that wastes less than 2 of 5 lanes, else the one that wastes least."""
    smallest = min(32, triton.next_power_of_2(max(size, 1)))
    blocks = [smallest << i for i in range((largest // smallest).bit_length())]
    return min(blocks, key=lambda block: (max(1.4, triton.cdiv(size, block) * block / max(size, 1)), -block))


@triton.jit
def sizes(channels, inner, width, PLANES: tl.constexpr, ALIGNED: tl.constexpr):
    """Channels and pixels; when rows are aligned, in a form that lets the compiler see it (16-byte accesses)."""
    if width is not None:
        channels = tl.load(width)
    if ALIGNED:
        if PLANES:
            inner = inner // 8 * 8
        else:
            channels = channels // 8 * 8
    return channels, inner


@triton.jit
def tile(t, block, outer, channels, inner, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Offsets and mask [ROWS, COLS] of a block's t-th tile, and how many values a channel has in it."""
    if PLANES:
        across = tl.cdiv(inner, COLS)
        row, col, end = (t // across) * ROWS, (t % across) * COLS, inner
        stride, start = channels.to(tl.int64) * inner, block.to(tl.int64) * inner
    else:
        row, col, end = t * ROWS, block * COLS, channels
        stride, start = channels.to(tl.int64), 0
    rows, cols = row + tl.arange(0, ROWS)[:, None], col + tl.arange(0, COLS)[None, :]
    count = tl.minimum(outer - row, ROWS)
    if PLANES:
        count *= tl.minimum(inner - col, COLS)
    return rows * stride + (start + cols), (rows < outer) & (cols < end), count


@triton.jit
def channels_of(block, channels, PLANES: tl.constexpr, COLS: tl.constexpr):
    """The channels of a block, [COLS] of rows and [1] of planes, and which of them exist."""
    if PLANES:
        c = block + tl.arange(0, 1)
    else:
        c = block * COLS + tl.arange(0, COLS)
    return c, c < channels


@triton.jit
def total(values, PLANES: tl.constexpr):
    """Sums [ROWS, COLS] over what belongs to one channel: [COLS] of rows, [1] of planes."""
    sums = tl.sum(values, 0)
    if PLANES:
        sums = tl.sum(sums[None, :], 1)
    return sums


@triton.jit
def coefficients(mean, invstd, weight, bias, c, active):
    """Of z = (x - center) * scale + shift, in float64: the center is the mean, rounded; the shift has what was lost."""
    center = mean.to(tl.float32).to(tl.float64)
    scale = invstd
    if weight is not None:
        scale *= tl.load(weight + c, active, other=0).to(tl.float64)
    shift = (center - mean) * scale
    if bias is not None:
        shift += tl.load(bias + c, active, other=0).to(tl.float64)
    return center, scale, shift


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z); comparisons are written so that NaN comes through."""
    if ACTIVATION == RELU:
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == RELU6:
        z = tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    elif ACTIVATION == SILU:
        z = z / (1 + tl.exp(-z))
    elif ACTIVATION == HARDSWISH:
        z = tl.where(z <= -3, 0 * z, tl.where(z >= 3, z, z * (z + 3) / 6))
    return z


@triton.jit
def activate_backward(dy, z, ACTIVATION: tl.constexpr):
    """The product dy * act'(z); for relu and relu6 act(z) does as well as z."""
    if ACTIVATION == RELU:
        dy = tl.where(z <= 0, 0.0, dy)
    elif ACTIVATION == RELU6:
        dy = tl.where(z <= 0, 0.0, tl.where(z >= 6, 0.0, dy))
    elif ACTIVATION == SILU:
        s = 1 / (1 + tl.exp(-z))
        dy = dy * s * (1 + z * (1 - s))
    elif ACTIVATION == HARDSWISH:
        dy = tl.where(z <= -3, 0.0, tl.where(z >= 3, dy, dy * (z / 3 + 0.5)))
    return dy
