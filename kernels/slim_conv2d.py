"""Convolution as an implicit matrix product with the full weight read in place, channels_last.

y[pixel, o] = sum over taps (r, s) and channels i of p(x)[input pixel(pixel, r, s), i] W[o, i, r, s] + b[o].
Backward-data is the same product for each of the stride's phases, with its taps; backward-weight is
one product of rows per tap. p is the prologue of `slim_linear`; padding stands after it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastslim.kernels import matmul_tiles as tiles
from fastslim.kernels.conv_taps import forward_taps, products
from fastslim.kernels.matmul_parts import (
    UNIT_K,
    UNIT_N,
    finish_tile,
    launch_split_sum,
    multiple,
    pixel_rows,
    precision_of,
    rounded_to,
    tile_of,
    with_prologue,
)
from fastslim.kernels.matmul_tiles import Operands, Tile
from fastslim.kernels.matmul_variants import forward_variant, weight_variant
from fastslim.kernels.variant import Variant

Pair = tuple[int, int]


@triton.jit(
    do_not_specialize=["n", "k", "stride_x", "stride_wn", "stride_wk", "stride_wr", "stride_ws", "stride_y",
                       "stride_saved", "rows", "grid_h", "grid_w", "x_h", "x_w", "y_h", "y_w", "from_h", "from_w",
                       "pace_h", "pace_w", "reach_h", "reach_w", "to_h", "to_w", "step_h", "step_w", "first_r",
                       "first_s", "skip_r", "skip_s", "taps_h", "taps_w"]
)  # fmt: skip
def slim_conv2d_fwd_kernel(
    x, w, bias, prologue, addend, saved, y, stats, widths,
    n, k, stride_x, stride_wn, stride_wk, stride_wr, stride_ws, stride_y, stride_saved,
    rows, grid_h, grid_w, x_h, x_w, y_h, y_w, from_h, from_w, pace_h, pace_w, reach_h, reach_w,
    to_h, to_w, step_h, step_w, first_r, first_s, skip_r, skip_s, taps_h, taps_w,
    UNIT: tl.constexpr, MULTIPLE: tl.constexpr, TRANSPOSED: tl.constexpr, ACTIVATION: tl.constexpr,
    SAVED_ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of y [pixels, n] = epilogue(addend + sum over taps of p(x) [input pixels, k] @ w[tap] [k, n]).

    The output pixels are a grid (N, grid_h, grid_w), rows of it in all. Its point (h, w) stands at
    (to + step * h, ...) of y; tap t of a row (column) reads x at from + pace * h + reach * t and the
    weight at first + skip * t. Other arguments as of `slim_linear_fwd_kernel`.
    """
    if widths is not None:
        k = tl.load(widths + (1 if TRANSPOSED else 0))
        n = tl.load(widths + (0 if TRANSPOSED else 1))
        stride_x, stride_y, stride_saved = k, n, n
    n, k = rounded_to(n, MULTIPLE), rounded_to(k, MULTIPLE)
    stride_x, stride_y = rounded_to(stride_x, MULTIPLE), rounded_to(stride_y, MULTIPLE)
    stride_saved = rounded_to(stride_saved, MULTIPLE)
    if UNIT != 0:
        stride_wr, stride_ws = rounded_to(stride_wr, MULTIPLE), rounded_to(stride_ws, MULTIPLE)
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
    line = row // grid_w
    image = line // grid_h
    at_h, at_w = line - image * grid_h, row - line * grid_w
    out_row = ((image * y_h + to_h + step_h * at_h) * y_w + to_w + step_w * at_w).to(tl.int64)
    from_h, from_w = from_h + pace_h * at_h, from_w + pace_w * at_w
    w_columns = w + column.to(tl.int64)[None, :] * stride_wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if addend is not None:
        inside = row_inside[:, None] & (column < n)[None, :]
        acc += tl.load(addend + out_row[:, None] * stride_y + column[None, :], mask=inside, other=0.0)
    blocks = tl.cdiv(k, BLOCK_K)
    for step in range(taps_h * taps_w * blocks):
        tap = step // blocks
        depth = (step - tap * blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        r, s = tap // taps_w, tap % taps_w
        h, v = from_h + reach_h * r, from_w + reach_w * s
        pixel_inside = row_inside & (h >= 0) & (h < x_h) & (v >= 0) & (v < x_w)
        pixel = ((image * x_h + h) * x_w + v).to(tl.int64)
        a_inside = pixel_inside[:, None] & (depth < k)[None, :]
        a = tl.load(x + pixel[:, None] * stride_x + depth[None, :], mask=a_inside, other=0.0)
        w_tap = w_columns + (first_r + skip_r * r) * stride_wr + (first_s + skip_s * s) * stride_ws
        w_inside = (depth < k)[:, None] & (column < n)[None, :]
        b = tl.load(w_tap + depth.to(tl.int64)[:, None] * stride_wk, mask=w_inside, other=0.0)
        if prologue is not None:
            a = tl.where(pixel_inside[:, None], with_prologue(a, prologue, depth, k, ACTIVATION), 0.0)
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision=PRECISION)
    finish_tile(
        acc, y, bias, saved, stats, out_row, row_inside, column, n, stride_y, stride_saved, tile_m,
        SAVED_ACTIVATION, BLOCK_M,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["rows", "rows_per_split", "c_out", "c_in", "stride_dy", "stride_x", "stride_split", "stride_r",
                       "stride_s", "stride_o", "stride_i", "x_h", "x_w", "y_h", "y_w", "from_h", "from_w", "pace_h",
                       "pace_w", "reach_h", "reach_w", "taps_w"]
)  # fmt: skip
def slim_conv2d_bwd_weight_kernel(
    dy, x, prologue, out, widths, rows, rows_per_split, c_out, c_in, stride_dy, stride_x,
    stride_split, stride_r, stride_s, stride_o, stride_i,
    x_h, x_w, y_h, y_w, from_h, from_w, pace_h, pace_w, reach_h, reach_w, taps_w,
    MULTIPLE: tl.constexpr, ACTIVATION: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of out [splits, kh, kw, c_out, c_in] (+)= dy^T @ p(x at the tap), over this split's output pixels.

    Grid (tiles, taps, splits); arguments as of the other two kernels.
    """
    if widths is not None:
        c_in, c_out = tl.load(widths), tl.load(widths + 1)
        stride_x, stride_dy = c_in, c_out
    c_out, c_in = rounded_to(c_out, MULTIPLE), rounded_to(c_in, MULTIPLE)
    stride_dy, stride_x = rounded_to(stride_dy, MULTIPLE), rounded_to(stride_x, MULTIPLE)
    tiles_i = tl.cdiv(c_in, BLOCK_N)
    pid, tap, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if pid >= tl.cdiv(c_out, BLOCK_M) * tiles_i:
        return
    o = pid // tiles_i * BLOCK_M + tl.arange(0, BLOCK_M)
    i = pid % tiles_i * BLOCK_N + tl.arange(0, BLOCK_N)
    r, s = tap // taps_w, tap % taps_w
    from_h, from_w = from_h + reach_h * r, from_w + reach_w * s
    first = split * rows_per_split
    end = tl.minimum(first + rows_per_split, rows)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in range(tl.cdiv(end - first, BLOCK_K)):
        row = first + block * BLOCK_K + tl.arange(0, BLOCK_K)
        line = row // y_w
        image = line // y_h
        h, v = from_h + pace_h * (line - image * y_h), from_w + pace_w * (row - line * y_w)
        pixel = ((image * x_h + h) * x_w + v).to(tl.int64)
        pixel_inside = (row < end) & (h >= 0) & (h < x_h) & (v >= 0) & (v < x_w)
        g_inside = (row < end)[None, :] & (o < c_out)[:, None]
        g = tl.load(dy + row.to(tl.int64)[None, :] * stride_dy + o[:, None], mask=g_inside, other=0.0)
        a_inside = pixel_inside[:, None] & (i < c_in)[None, :]
        a = tl.load(x + pixel[:, None] * stride_x + i[None, :], mask=a_inside, other=0.0)
        if prologue is not None:
            a = tl.where(pixel_inside[:, None], with_prologue(a, prologue, i, c_in, ACTIVATION), 0.0)
        acc = tl.dot(g, a, acc, input_precision=PRECISION)
    inside = (o < c_out)[:, None] & (i < c_in)[None, :]
    to = out + tl.cast(split, tl.int64) * stride_split + r * stride_r + s * stride_s
    to = to + o.to(tl.int64)[:, None] * stride_o + i.to(tl.int64)[None, :] * stride_i
    if ADD:
        acc += tl.load(to, mask=inside, other=0.0).to(tl.float32)
    tl.store(to, acc.to(out.dtype.element_ty), mask=inside)


def launch_slim_conv2d_fwd(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    transposed: bool = False,
    bias: Tensor | None = None,
    prologue: Tensor | None = None,
    activation: int = 0,
    addend: Tensor | None = None,
    saved: Tensor | None = None,
    saved_activation: int = 0,
    stats: Tensor | None = None,
    widths: Tensor | None = None,
    width_multiple: int = 1,
    tile: Tile | None = None,
    recorded: str | None = None,
) -> None:
    """Writes ``y (N, n, H, W)``, channels_last: the convolution of `x`, or with `transposed` its input's gradient.

    Args:
        x: input ``(N, k, H, W)``, or the output's gradient; channels_last or a slice of such channels.
        weight: the active ``(c_out, c_in, kh, kw)``, a view of the full one.
        y: output, or the input's gradient.
        addend: ``(N, n, H, W)`` fp32 with the strides of `y`, may be `y` itself.
        saved: output of the activation before this layer, of the shape of `y`: masks `y`.
        stats: ``(ceil(N * H * W / tile.m), 3, n)`` fp32.
        (The others are those of `launch_slim_linear_fwd`.)
    """
    n, k = (weight.shape[1], weight.shape[0]) if transposed else weight.shape[:2]
    stride_wn, stride_wk = (weight.stride(1), weight.stride(0)) if transposed else weight.stride()[:2]
    unit = 1 if stride_wk == 1 else 2 if stride_wn == 1 else 0
    rows_x, rows_y = pixel_rows(x), pixel_rows(y)
    rows_saved = None if saved is None else pixel_rows(saved)
    stride_saved = 0 if rows_saved is None else rows_saved.stride(0)
    numbers = [n, k, rows_x.stride(0), rows_y.stride(0), stride_saved]
    numbers += [*weight.stride()[2:], stride_wn if unit == 1 else stride_wk] if unit else []
    numbers += [] if widths is None else [width_multiple]
    operands = Operands(
        x.element_size(), multiple(numbers, rows_x, weight, y, rows_saved), precision_of(x, convolution=True)
    )
    for h, v in products(y.shape[2:], weight.shape[2:], stride, padding, dilation, transposed):
        rows = y.shape[0] * h.size * v.size
        if rows == 0 or n == 0:
            continue
        # Where a tap reads takes the registers that the widest tile has not left.
        shape = tile or tiles.choose_tile(rows, n, operands, fused=True, recorded=recorded)
        with torch.cuda.device_of(x):
            slim_conv2d_fwd_kernel[(triton.cdiv(rows, shape.m) * triton.cdiv(n, shape.n),)](
                rows_x, weight, bias, prologue, addend, rows_saved, y, stats, widths,
                n, k, rows_x.stride(0), stride_wn, stride_wk, *weight.stride()[2:], rows_y.stride(0), stride_saved,
                rows, h.size, v.size, *x.shape[2:], *y.shape[2:], h.origin, v.origin, h.pace, v.pace, h.reach, v.reach,
                h.to, v.to, h.step, v.step, h.first, v.first, h.skip, v.skip, h.taps, v.taps,
                UNIT=unit, MULTIPLE=operands.multiple, TRANSPOSED=transposed, ACTIVATION=activation,
                SAVED_ACTIVATION=saved_activation, PRECISION=operands.precision,
                BLOCK_M=shape.m, BLOCK_N=shape.n, BLOCK_K=shape.k, GROUP_M=shape.group,
                num_warps=shape.warps, num_stages=shape.stages,
            )  # fmt: skip


def launch_slim_conv2d_bwd_weight(
    dy: Tensor,
    x: Tensor,
    gradient: Tensor,
    *,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    add: bool,
    prologue: Tensor | None = None,
    activation: int = 0,
    widths: Tensor | None = None,
    width_multiple: int = 1,
    tile: Tile | None = None,
    recorded: str | None = None,
    splits: Pair | None = None,
) -> None:
    """Writes or adds the weight's gradient to `gradient`, a strided region ``(c_out, c_in, kh, kw)``.

    Args:
        splits: number of parts of the output's pixels, and pixels of a part; chosen by default.
    """
    (c_out, c_in, kh, kw), rows = gradient.shape, dy.shape[0] * dy.shape[2] * dy.shape[3]
    if gradient.numel() == 0:
        return
    if rows == 0:
        if not add:
            gradient.zero_()
        return
    rows_x, rows_dy = pixel_rows(x), pixel_rows(dy)
    numbers = [c_out, c_in, rows_x.stride(0), rows_dy.stride(0)] + ([] if widths is None else [width_multiple])
    operands = Operands(x.element_size(), multiple(numbers, rows_dy, rows_x), precision_of(x, convolution=True))
    if tile is None:
        tile = tiles.choose_weight_tile(c_out, c_in, operands, taps=True, recorded=recorded)
    grid = triton.cdiv(c_out, tile.m) * triton.cdiv(c_in, tile.n)
    parts, rows_per_split = splits or tiles.choose_splits(rows, grid * kh * kw, tile)
    if widths is not None:  # the sum of the parts is laid out by the widths, which only the device knows
        parts, rows_per_split = 1, rows
    partial = gradient.new_empty(parts, kh, kw, c_out, c_in, dtype=torch.float32) if parts > 1 else None
    stride_o, stride_i, stride_r, stride_s = gradient.stride()
    strides = (0, stride_r, stride_s, stride_o, stride_i) if partial is None else partial.stride()
    down, across = (forward_taps(dy.shape[2 + d], (kh, kw)[d], stride[d], padding[d], dilation[d]) for d in (0, 1))
    with torch.cuda.device_of(x):
        slim_conv2d_bwd_weight_kernel[(grid, kh * kw, parts)](
            rows_dy, rows_x, prologue, gradient if partial is None else partial, widths, rows, rows_per_split,
            c_out, c_in, rows_dy.stride(0), rows_x.stride(0), *strides, *x.shape[2:], *dy.shape[2:],
            down.origin, across.origin, down.pace, across.pace, down.reach, across.reach, kw,
            MULTIPLE=operands.multiple, ACTIVATION=activation, ADD=add and partial is None,
            PRECISION=operands.precision, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if partial is not None:
            launch_split_sum(partial, gradient, add=add)


def variants() -> list[Variant]:
    """The programs that dispatch can choose: every tile plain, and the fused ones where they need most registers."""
    forward, weight = slim_conv2d_fwd_kernel, slim_conv2d_bwd_weight_kernel
    found = []
    for tile in tiles.FUSED_TILES:
        found.append(forward_variant(forward, "forward", tile, fused="b"))
        found.append(forward_variant(forward, "prologue-statistics", tile, fused="bps"))
        found.append(forward_variant(forward, "backward-input-mask", tile, unit=2, fused="m"))
    found.append(forward_variant(forward, "any-width", tiles.SMALL, "fp16", fused="bps", UNIT=0, MULTIPLE=1))
    found.append(forward_variant(forward, "contiguous-weight", tiles.NARROW, fused="b", UNIT=0))
    found.append(forward_variant(forward, "forward", tiles.SMALL, "fp32", fused="b"))
    found.append(forward_variant(forward, "device-widths-addend", tiles.NARROW, fused="aw"))
    found += [weight_variant(weight, tile, prologue=True) for tile in tiles.CONV_WEIGHT_TILES]
    found.append(weight_variant(weight, tiles.SMALL, "fp32"))
    return found
