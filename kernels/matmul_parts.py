"""What the matrix kernels share on the device: order of the tiles, prologue, epilogues, sum of the splits."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

UNIT_K, UNIT_N = tl.constexpr(1), tl.constexpr(2)  # which stride of w is 1
RELU, RELU6, SILU, HARDSWISH = (tl.constexpr(code) for code in (1, 2, 3, 4))


@triton.jit
def rounded_to(value, MULTIPLE: tl.constexpr):
    """The value, which is a multiple of MULTIPLE, in a form that tells the compiler so: it may then load 16 bytes."""
    if MULTIPLE > 1:
        value = value // MULTIPLE * MULTIPLE
    return value


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a program's tile: GROUP_M rows of tiles at a time."""
    first = pid // (GROUP_M * tiles_n) * GROUP_M
    size = tl.minimum(tiles_m - first, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first + within % size, within // size


@triton.jit
def activated(value, ACTIVATION: tl.constexpr):
    """The activation with this code of `fastslim.ops.batch_norm_act.ACTIVATIONS`."""
    if ACTIVATION == RELU:
        value = tl.maximum(value, 0.0)
    elif ACTIVATION == RELU6:
        value = tl.minimum(tl.maximum(value, 0.0), 6.0)
    elif ACTIVATION == SILU:
        value = value / (1.0 + tl.exp(-value))
    elif ACTIVATION == HARDSWISH:
        value = value * tl.minimum(tl.maximum(value + 3.0, 0.0), 6.0) / 6.0
    return value


@triton.jit
def with_prologue(x, prologue, columns, n, ACTIVATION: tl.constexpr):
    """act((x - center) * scale + shift) of a block with these columns; prologue [3, n] fp32, dense."""
    inside = columns < n
    center = tl.load(prologue + columns, mask=inside, other=0.0)
    scale = tl.load(prologue + n + columns, mask=inside, other=0.0)
    shift = tl.load(prologue + 2 * n + columns, mask=inside, other=0.0)
    value = (x.to(tl.float32) - center[None, :]) * scale[None, :] + shift[None, :]
    return activated(value, ACTIVATION).to(x.dtype)


@triton.jit
def finish_tile(
    acc, y, bias, saved, stats, out_rows, row_inside, columns, n, stride_y, stride_saved, chunk,
    SAVED_ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Bias, mask of the preceding activation, store, and the statistics of what was stored.

    Args:
        acc: [BLOCK_M, BLOCK_N] fp32.
        y: [.., n], row stride `stride_y`.
        bias: [n] or None.
        saved: output of the preceding activation, as `y` with row stride `stride_saved`, or None.
        stats: [chunks, 3, n] fp32 (shift, sum, sum of squares, about the chunk's first row), or None.
        out_rows: int64 rows of `y`; `row_inside` tells which exist.
    """
    inside = row_inside[:, None] & (columns < n)[None, :]
    if bias is not None:
        acc += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    if saved is not None:
        output = tl.load(saved + out_rows[:, None] * stride_saved + columns[None, :], mask=inside, other=0.0)
        keep = output > 0
        if SAVED_ACTIVATION == RELU6:
            keep = keep & (output < 6)
        acc = tl.where(keep, acc, 0.0)
    value = acc.to(y.dtype.element_ty)
    tl.store(y + out_rows[:, None] * stride_y + columns[None, :], value, mask=inside)
    if stats is not None:
        rounded = value.to(tl.float32)
        first = tl.sum(tl.where((tl.arange(0, BLOCK_M) == 0)[:, None], rounded, 0.0), 0)
        centred = tl.where(row_inside[:, None], rounded - first[None, :], 0.0)
        at = stats + chunk.to(tl.int64) * 3 * n + columns
        tl.store(at, first, mask=columns < n)
        tl.store(at + n, tl.sum(centred, 0), mask=columns < n)
        tl.store(at + 2 * n, tl.sum(centred * centred, 0), mask=columns < n)


@triton.jit(do_not_specialize=["count", "splits", "c_in", "c_out", "stride_o", "stride_i", "stride_r", "stride_s"])
def split_sum_kernel(
    partial, gradient, count, splits, c_in, c_out, taps_w: tl.constexpr, stride_o, stride_i, stride_r, stride_s,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums partial [splits, kh, kw, c_out, c_in] fp32 over the splits into the strided gradient [c_out, c_in, kh, kw].

    `count` is kh * kw * c_out * c_in; ADD adds to what the gradient holds.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(splits):
        total += tl.load(partial + tl.cast(split, tl.int64) * count + at, mask=inside, other=0.0)
    row = at // c_in
    tap = row // c_out
    where = (row % c_out).to(tl.int64) * stride_o + (at % c_in).to(tl.int64) * stride_i
    where += tap // taps_w * stride_r + tap % taps_w * stride_s
    if ADD:
        total += tl.load(gradient + where, mask=inside, other=0.0).to(tl.float32)
    tl.store(gradient + where, total.to(gradient.dtype.element_ty), mask=inside)


SUM_BLOCK = 1024


def launch_split_sum(partial: Tensor, gradient: Tensor, *, add: bool) -> None:
    """`gradient (c_out, c_in, kh, kw)`, any strides, from `partial (splits, kh, kw, c_out, c_in)`, dense."""
    splits, _, kw, c_out, c_in = partial.shape
    count = partial[0].numel()
    split_sum_kernel[(triton.cdiv(count, SUM_BLOCK),)](
        partial, gradient, count, splits, c_in, c_out, kw, *gradient.stride(), ADD=add, BLOCK=SUM_BLOCK
    )


def multiple(numbers: list[int], *tensors: Tensor | None) -> int:
    """Elements that 16 bytes hold if every number is a multiple of it and every tensor starts there, else 1."""
    given = [t for t in tensors if t is not None]
    size = 16 // min(t.element_size() for t in given)
    aligned = all(t.data_ptr() % 16 == 0 for t in given) and all(number % size == 0 for number in numbers)
    return size if aligned else 1


def precision_of(x: Tensor, *, convolution: bool = False) -> str:
    """How operands are multiplied: as they are, or float32 rounded to ``"tf32"`` where torch's settings let it."""
    settings: Any = torch.backends.cudnn.conv if convolution else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return "tf32" if x.dtype == torch.float32 and settings.fp32_precision == "tf32" else "ieee"


def unit_rows(t: Tensor) -> Tensor:
    """The matrix, copied if the elements of a row do not lie side by side."""
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def pixel_rows(t: Tensor) -> Tensor:
    """(N, C, H, W) as the matrix (N * H * W, C): of channels_last, and of a slice of such channels, a view."""
    return unit_rows(t.permute(0, 2, 3, 1).flatten(0, 2))
