"""Matrix products with a full weight read in place: y = p(x) W^T + b, dx = dy W, dW += dy^T p(x).

p(x) = act((x - center) * scale + shift) is an optional prologue, the normalisation before this layer;
sums are fp32, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastslim.kernels import matmul_tiles as tiles
from fastslim.kernels.matmul_parts import (
    SUM_BLOCK,
    UNIT_K,
    UNIT_N,
    finish_tile,
    launch_split_sum,
    multiple,
    precision_of,
    rounded_to,
    split_sum_kernel,
    tile_of,
    unit_rows,
    with_prologue,
)
from fastslim.kernels.matmul_tiles import Operands, Tile
from fastslim.kernels.matmul_variants import forward_variant, weight_variant
from fastslim.kernels.variant import Variant


@triton.jit(do_not_specialize=["rows", "n", "k", "stride_x", "stride_wn", "stride_wk", "stride_y", "stride_saved"])
def slim_linear_fwd_kernel(
    x, w, bias, prologue, addend, saved, y, stats, widths,
    rows, n, k, stride_x, stride_wn, stride_wk, stride_y, stride_saved,
    UNIT: tl.constexpr, MULTIPLE: tl.constexpr, TRANSPOSED: tl.constexpr, ACTIVATION: tl.constexpr,
    SAVED_ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of y [rows, n] = epilogue(addend + p(x) @ w), x [rows, k], w [k, n] through strides.

    Args:
        bias: [n] or None.
        prologue: [3, k] fp32 (center, scale, shift) or None.
        addend: [rows, n] fp32, row stride `stride_y`, or None.
        saved: [rows, n] output of the activation whose gradient masks y, or None.
        stats: [ceil(rows / BLOCK_M), 3, n] fp32 or None.
        widths: [2] int32 (c_in, c_out) in device memory, or None. Then n and k are only the largest
            widths, and the rows of x, y and saved are dense.
        UNIT: which stride of w is 1.
        MULTIPLE: all widths and strides are multiples of it.
        TRANSPOSED: k is c_out and n is c_in (backward-data).
    """
    if widths is not None:
        k = tl.load(widths + (1 if TRANSPOSED else 0))
        n = tl.load(widths + (0 if TRANSPOSED else 1))
        stride_x, stride_y, stride_saved = k, n, n
    n, k = rounded_to(n, MULTIPLE), rounded_to(k, MULTIPLE)
    stride_x, stride_y = rounded_to(stride_x, MULTIPLE), rounded_to(stride_y, MULTIPLE)
    stride_saved = rounded_to(stride_saved, MULTIPLE)
    if UNIT == UNIT_K:
        stride_wn, stride_wk = rounded_to(stride_wn, MULTIPLE), 1
    elif UNIT == UNIT_N:
        stride_wk, stride_wn = rounded_to(stride_wk, MULTIPLE), 1
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    if pid >= tiles_m * tiles_n:
        return
    tile_m, tile_n = tile_of(pid, tiles_m, tiles_n, GROUP_M)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = row < rows
    row = tl.minimum(row, rows - 1).to(tl.int64)  # rows past the end compute the last one again, unseen
    x_rows = x + row[:, None] * stride_x
    w_columns = w + column.to(tl.int64)[None, :] * stride_wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if addend is not None:
        inside = row_inside[:, None] & (column < n)[None, :]
        acc += tl.load(addend + row[:, None] * stride_y + column[None, :], mask=inside, other=0.0)
    for block in range(tl.cdiv(k, BLOCK_K)):
        depth = block * BLOCK_K + tl.arange(0, BLOCK_K)
        a = tl.load(x_rows + depth[None, :], mask=(depth < k)[None, :], other=0.0)
        w_inside = (depth < k)[:, None] & (column < n)[None, :]
        b = tl.load(w_columns + depth.to(tl.int64)[:, None] * stride_wk, mask=w_inside, other=0.0)
        if prologue is not None:
            a = with_prologue(a, prologue, depth, k, ACTIVATION)
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision=PRECISION)
    finish_tile(
        acc, y, bias, saved, stats, row, row_inside, column, n, stride_y, stride_saved, tile_m,
        SAVED_ACTIVATION, BLOCK_M,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["rows", "rows_per_split", "c_out", "c_in", "stride_dy", "stride_x", "stride_split", "stride_o",
                       "stride_i"]
)  # fmt: skip
def slim_linear_bwd_weight_kernel(
    dy, x, prologue, out, widths, rows, rows_per_split, c_out, c_in, stride_dy, stride_x,
    stride_split, stride_o, stride_i,
    MULTIPLE: tl.constexpr, ACTIVATION: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of out [splits, c_out, c_in] (+)= dy^T @ p(x) over this split's rows.

    dy [rows, c_out], x [rows, c_in]; grid (tiles, splits). `out` is the partial sums, or with one split
    the gradient itself. With `widths` in device memory, (c_in, c_out), the arguments are only the
    largest, and dy and x have dense rows.
    """
    if widths is not None:
        c_in, c_out = tl.load(widths), tl.load(widths + 1)
        stride_x, stride_dy = c_in, c_out
    c_out, c_in = rounded_to(c_out, MULTIPLE), rounded_to(c_in, MULTIPLE)
    stride_dy, stride_x = rounded_to(stride_dy, MULTIPLE), rounded_to(stride_x, MULTIPLE)
    tiles_i = tl.cdiv(c_in, BLOCK_N)
    pid, split = tl.program_id(0), tl.program_id(1)
    if pid >= tl.cdiv(c_out, BLOCK_M) * tiles_i:
        return
    o = pid // tiles_i * BLOCK_M + tl.arange(0, BLOCK_M)
    i = pid % tiles_i * BLOCK_N + tl.arange(0, BLOCK_N)
    first = split * rows_per_split
    end = tl.minimum(first + rows_per_split, rows)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in range(tl.cdiv(end - first, BLOCK_K)):
        row = first + block * BLOCK_K + tl.arange(0, BLOCK_K)
        at = row.to(tl.int64)
        g_inside = (row < end)[None, :] & (o < c_out)[:, None]
        g = tl.load(dy + at[None, :] * stride_dy + o[:, None], mask=g_inside, other=0.0)
        a_inside = (row < end)[:, None] & (i < c_in)[None, :]
        a = tl.load(x + at[:, None] * stride_x + i[None, :], mask=a_inside, other=0.0)
        if prologue is not None:
            a = with_prologue(a, prologue, i, c_in, ACTIVATION)
        acc = tl.dot(g, a, acc, input_precision=PRECISION)
    inside = (o < c_out)[:, None] & (i < c_in)[None, :]
    to = out + tl.cast(split, tl.int64) * stride_split + o.to(tl.int64)[:, None] * stride_o
    to += i.to(tl.int64)[None, :] * stride_i
    if ADD:
        acc += tl.load(to, mask=inside, other=0.0).to(tl.float32)
    tl.store(to, acc.to(out.dtype.element_ty), mask=inside)


def launch_slim_linear_fwd(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    *,
    bias: Tensor | None = None,
    prologue: Tensor | None = None,
    activation: int = 0,
    addend: Tensor | None = None,
    saved: Tensor | None = None,
    saved_activation: int = 0,
    stats: Tensor | None = None,
    widths: Tensor | None = None,
    width_multiple: int = 1,
    transposed: bool = False,
    tile: Tile | None = None,
    recorded: str | None = None,
) -> None:
    """Writes ``y (rows, n) = x (rows, k) @ w (k, n)`` with what is fused; rows have unit stride inside.

    Args:
        x: input, or the output's gradient.
        w: the active weight as ``(k, n)``, a view of the full one.
        y: output, or the input's gradient; fp32 where it is the `addend` of a later call.
        bias: ``(n,)``.
        prologue: ``(3, k)`` fp32: center, scale, shift; applied with `activation` to `x` as it is read.
        activation: position in `ACTIVATIONS`.
        addend: ``(rows, n)`` fp32 with the strides of `y`, may be `y` itself.
        saved: output of the preceding activation, ``(rows, n)``: masks `y`.
        saved_activation: 1 (ReLU) or 2 (ReLU6).
        stats: ``(ceil(rows / tile.m), 3, n)`` fp32: see `finish_tile`.
        widths: int32 (c_in, c_out) on the device; the shapes are then the largest.
        width_multiple: what the widths in device memory are multiples of.
        transposed: `k` is c_out, `n` is c_in.
        tile: the chosen one by default.
        recorded: name of the tile that was measured fastest.
    """
    (rows, k), n = x.shape, w.shape[1]
    if rows == 0 or n == 0:
        return
    x, saved = unit_rows(x), None if saved is None else unit_rows(saved)
    unit = 1 if w.stride(0) == 1 else 2 if w.stride(1) == 1 else 0
    numbers = [n, k, x.stride(0), y.stride(0), 0 if saved is None else saved.stride(0)]
    numbers += [w.stride(2 - unit)] if unit else []
    numbers += [] if widths is None else [width_multiple]
    operands = Operands(x.element_size(), multiple(numbers, x, w, y, saved), precision_of(x))
    if tile is None:
        fused = prologue is not None or saved is not None or stats is not None
        tile = tiles.choose_tile(rows, n, operands, fused=fused, recorded=recorded)
    with torch.cuda.device_of(x):
        slim_linear_fwd_kernel[(triton.cdiv(rows, tile.m) * triton.cdiv(n, tile.n),)](
            x, w, bias, prologue, addend, saved, y, stats, widths,
            rows, n, k, x.stride(0), w.stride(1), w.stride(0), y.stride(0), 0 if saved is None else saved.stride(0),
            UNIT=unit, MULTIPLE=operands.multiple, TRANSPOSED=transposed, ACTIVATION=activation,
            SAVED_ACTIVATION=saved_activation, PRECISION=operands.precision,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP_M=tile.group,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def launch_slim_linear_bwd_weight(
    dy: Tensor,
    x: Tensor,
    gradient: Tensor,
    *,
    add: bool,
    prologue: Tensor | None = None,
    activation: int = 0,
    widths: Tensor | None = None,
    width_multiple: int = 1,
    tile: Tile | None = None,
    recorded: str | None = None,
    splits: tuple[int, int] | None = None,
) -> None:
    """Writes or adds ``dy (rows, c_out)^T @ p(x (rows, c_in))`` to `gradient`, a strided region.

    Args:
        splits: number of parts of the rows and rows of a part; chosen by default. With `widths` there is one.
    """
    (rows, c_out), c_in = dy.shape, x.shape[1]
    if c_out == 0 or c_in == 0:
        return
    if rows == 0:
        if not add:
            gradient.zero_()
        return
    dy, x = unit_rows(dy), unit_rows(x)
    numbers = [c_out, c_in, dy.stride(0), x.stride(0)] + ([] if widths is None else [width_multiple])
    operands = Operands(x.element_size(), multiple(numbers, dy, x), precision_of(x))
    if tile is None:
        tile = tiles.choose_weight_tile(c_out, c_in, operands, recorded=recorded)
    grid = triton.cdiv(c_out, tile.m) * triton.cdiv(c_in, tile.n)
    parts, rows_per_split = splits or tiles.choose_splits(rows, grid, tile)
    if widths is not None:  # the sum of the parts is laid out by the widths, which only the device knows
        parts, rows_per_split = 1, rows
    partial = gradient.new_empty(parts, 1, 1, c_out, c_in, dtype=torch.float32) if parts > 1 else None
    out_strides = gradient.stride() if partial is None else partial.stride()[3:]
    with torch.cuda.device_of(x):
        slim_linear_bwd_weight_kernel[(grid, parts)](
            dy, x, prologue, gradient if partial is None else partial, widths, rows, rows_per_split, c_out, c_in,
            dy.stride(0), x.stride(0), c_out * c_in, *out_strides,
            MULTIPLE=operands.multiple, ACTIVATION=activation, ADD=add and partial is None,
            PRECISION=operands.precision, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if partial is not None:
            launch_split_sum(partial, gradient[:, :, None, None], add=add)


def variants() -> list[Variant]:
    """The programs that dispatch can choose: every tile plain, and the fused ones where they need most registers."""
    forward, weight = slim_linear_fwd_kernel, slim_linear_bwd_weight_kernel
    found = [forward_variant(forward, "forward", tile, fused="b") for tile in tiles.FORWARD_TILES]
    found.append(forward_variant(forward, "backward-input", tiles.WIDE, unit=2))
    for tile in tiles.FUSED_TILES:
        found.append(forward_variant(forward, "prologue-statistics", tile, fused="bps"))
        found.append(forward_variant(forward, "backward-input-mask", tile, unit=2, fused="m"))
    found.append(forward_variant(forward, "any-width", tiles.SMALL, "fp16", fused="bps", MULTIPLE=1))
    found += [forward_variant(forward, "forward", tile, "fp32", fused="b") for tile in (tiles.TF32, tiles.SMALL)]
    found.append(forward_variant(forward, "device-widths-addend", tiles.NARROW, fused="aw"))
    found += [weight_variant(weight, tile, prologue=True) for tile in tiles.WEIGHT_TILES]
    found += [weight_variant(weight, tile, "fp32") for tile in (tiles.TF32, tiles.SMALL)]
    found.append(weight_variant(weight, tiles.SMALL, "fp16", MULTIPLE=1))
    numbers = ("count", "splits", "c_in", "c_out", "stride_o", "stride_i", "stride_r", "stride_s")
    types = {"partial": "*fp32", "gradient": "*fp32"} | dict.fromkeys(numbers, "i32")
    constants = {"taps_w": 3, "ADD": True, "BLOCK": SUM_BLOCK}
    found.append(Variant("fp32", split_sum_kernel, types, constants, tuple(types)[:2], bound="latency"))
    return found
