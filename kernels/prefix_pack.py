"""Moves many strided blocks of memory in one launch: target = source, or target += source in float32.

Every program moves one tile of 4096 elements of one block. Where the innermost dimension is dense and
aligned on both sides it moves 4 elements at once, else single ones, neighbours in the target together.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastslim.kernels.variant import Variant

TILE = 4096  # kTransferTile: the table counts tiles of this size
NUM_WARPS = 8

# 32-bit words of a table's row, in the order of `struct Transfer` (csrc/include/fastslim/prefix_pack.h)
ROW = tl.constexpr(24)
SOURCE_STRIDE = tl.constexpr(4)
TARGET_STRIDE = tl.constexpr(8)
SIZE = tl.constexpr(12)
UNIT = tl.constexpr(16)
CHANNELS = tl.constexpr(20)
RANK = tl.constexpr(21)
KIND = tl.constexpr(22)
FIRST_TILE = tl.constexpr(23)
FLOAT64 = tl.constexpr(3)


@triton.jit
def _size(row, widths, d: tl.constexpr, HAS_WIDTHS: tl.constexpr):
    """Active size of a dimension."""
    size = tl.load(row + SIZE + d)
    if HAS_WIDTHS:
        channels = (tl.load(row + CHANNELS) >> (8 * d)) & 255
        active = tl.load(widths + channels, mask=channels < 2, other=0).to(tl.int64) * tl.load(row + UNIT + d)
        active = tl.minimum(tl.maximum(active, 0), size.to(tl.int64)).to(tl.int32)
        size = tl.where(channels < 2, active, size)
    return size


@triton.jit
def _stride(row, base: tl.constexpr, d: tl.constexpr, packed, n0, n1, n2, n3):
    """Stride of a dimension: the table's, or of a packed tensor of these sizes."""
    ranks = tl.load(row + RANK)
    mine = (ranks >> (8 * d)) & 255
    stride = tl.where((ranks & 255) < mine, n0, 1) * tl.where(((ranks >> 8) & 255) < mine, n1, 1)
    stride = stride * tl.where(((ranks >> 16) & 255) < mine, n2, 1)
    stride = stride * tl.where(((ranks >> 24) & 255) < mine, n3, 1)
    return tl.where(packed, stride, tl.load(row + base + d))


@triton.jit
def _in_fours(address, element, s0, s1, s2, s3, n1, n2, n3):
    """Whether four elements along the innermost dimension can always be accessed at once."""
    aligned = (address % tl.where(element == 0, 16, 8) == 0) & (s0 == 1)
    return aligned & ((n1 == 1) | (s1 % 4 == 0)) & ((n2 == 1) | (s2 % 4 == 0)) & ((n3 == 1) | (s3 % 4 == 0))


@triton.jit
def _offset(index, n0, n1, n2, s0, s1, s2, s3):
    rest = index // n0
    offset = (index % n0) * s0 + (rest % n1) * s1
    rest = rest // n1
    return offset + (rest % n2) * s2 + (rest // n2) * s3


@triton.jit
def _positions(first, total, COUNT: tl.constexpr):
    """The next COUNT positions of a block, and which of them it has."""
    at = first + tl.arange(0, COUNT)
    return at.to(tl.int32), at < total


@triton.jit
def _pointer(address, T: tl.constexpr, WIDE: tl.constexpr):
    pointer = address.to(tl.pointer_type(T))
    if WIDE:
        pointer = tl.multiple_of(pointer, 16 if T == tl.float32 else 8)
    return pointer


@triton.jit
def _load(address, offset, mask, element, WIDE: tl.constexpr, A: tl.constexpr):
    if element == 0:
        value = tl.load(_pointer(address, tl.float32, WIDE) + offset, mask=mask, other=0.0).to(A)
    elif element == 1:
        value = tl.load(_pointer(address, tl.bfloat16, WIDE) + offset, mask=mask, other=0.0).to(A)
    elif A == tl.float32:
        value = tl.load(_pointer(address, tl.float16, WIDE) + offset, mask=mask, other=0.0).to(A)
    elif element == 2:
        value = tl.load(_pointer(address, tl.float16, WIDE) + offset, mask=mask, other=0.0).to(A)
    else:
        value = tl.load(_pointer(address, tl.float64, WIDE) + offset, mask=mask, other=0.0).to(A)
    return value


@triton.jit
def _store(address, offset, mask, element, value, WIDE: tl.constexpr, A: tl.constexpr):
    if element == 0:
        tl.store(_pointer(address, tl.float32, WIDE) + offset, value.to(tl.float32), mask=mask)
    elif element == 1:
        tl.store(_pointer(address, tl.bfloat16, WIDE) + offset, value.to(tl.float32).to(tl.bfloat16), mask=mask)
    elif A == tl.float32:
        tl.store(_pointer(address, tl.float16, WIDE) + offset, value.to(tl.float16), mask=mask)
    elif element == 2:
        tl.store(_pointer(address, tl.float16, WIDE) + offset, value.to(tl.float32).to(tl.float16), mask=mask)
    else:
        tl.store(_pointer(address, tl.float64, WIDE) + offset, value.to(tl.float64), mask=mask)


@triton.jit
def _move(source, target, kind, from_, to, mask, WIDE: tl.constexpr, A: tl.constexpr):
    from_type, to_type = kind & 255, (kind >> 8) & 255
    value = _load(source, from_, mask, from_type, WIDE, A)
    if (kind >> 16) & 255 != 0:
        value = value + _load(target, to, mask, to_type, WIDE, A)
    _store(target, to, mask, to_type, value, WIDE, A)


@triton.jit
def _move_fours(source, target, kind, first, total, n0, n1, n2, f1, f2, f3, t1, t2, t3, TILE: tl.constexpr):
    index, live = _positions(first // 4, total // 4, TILE // 4)
    lane = tl.arange(0, 4)[None, :]
    from_ = _offset(index, n0 // 4, n1, n2, 1, f1 // 4, f2 // 4, f3 // 4)[:, None] * 4 + lane
    to = _offset(index, n0 // 4, n1, n2, 1, t1 // 4, t2 // 4, t3 // 4)[:, None] * 4 + lane
    _move(source, target, kind, from_, to, live[:, None], True, tl.float32)


@triton.jit
def _move_singles(
    source, target, kind, first, total, n0, n1, n2, f0, f1, f2, f3, t0, t1, t2, t3, TILE: tl.constexpr, A: tl.constexpr
):
    index, live = _positions(first, total, TILE)
    from_ = _offset(index, n0, n1, n2, f0, f1, f2, f3)
    to = _offset(index, n0, n1, n2, t0, t1, t2, t3)
    _move(source, target, kind, from_, to, live, False, A)


@triton.jit(do_not_specialize=["entries", "steps"])
def prefix_pack_kernel(table, words, widths, entries, steps, HAS_WIDTHS: tl.constexpr, TILE: tl.constexpr):
    """`table` (entries + 1, 12) int64 and `words` (entries + 1, 24) int32 are one memory; `widths` (entries, 2)."""
    tile = tl.program_id(0)
    entry = tile * 0
    last = tile * 0 + entries - 1
    for _ in range(steps):  # the last entry that starts at or before the tile
        middle = (entry + last + 1) // 2
        starts = tl.load(words + middle * ROW + FIRST_TILE) <= tile
        entry = tl.where(starts, middle, entry)
        last = tl.where(starts, last, middle - 1)
    row = words + entry * ROW
    active = widths + entry * 2
    n0 = _size(row, active, 0, HAS_WIDTHS)
    n1 = _size(row, active, 1, HAS_WIDTHS)
    n2 = _size(row, active, 2, HAS_WIDTHS)
    n3 = _size(row, active, 3, HAS_WIDTHS)
    total = n0.to(tl.int64) * n1 * n2 * n3
    n0, n1, n2 = tl.maximum(n0, 1), tl.maximum(n1, 1), tl.maximum(n2, 1)
    first = (tile - tl.load(row + FIRST_TILE)).to(tl.int64) * TILE
    kind = tl.load(row + KIND)
    dense = (kind >> 24) & 255
    f0 = _stride(row, SOURCE_STRIDE, 0, dense == 1, n0, n1, n2, n3)
    f1 = _stride(row, SOURCE_STRIDE, 1, dense == 1, n0, n1, n2, n3)
    f2 = _stride(row, SOURCE_STRIDE, 2, dense == 1, n0, n1, n2, n3)
    f3 = _stride(row, SOURCE_STRIDE, 3, dense == 1, n0, n1, n2, n3)
    t0 = _stride(row, TARGET_STRIDE, 0, dense == 2, n0, n1, n2, n3)
    t1 = _stride(row, TARGET_STRIDE, 1, dense == 2, n0, n1, n2, n3)
    t2 = _stride(row, TARGET_STRIDE, 2, dense == 2, n0, n1, n2, n3)
    t3 = _stride(row, TARGET_STRIDE, 3, dense == 2, n0, n1, n2, n3)
    source = tl.load(table + entry * (ROW // 2))
    target = tl.load(table + entry * (ROW // 2) + 1)
    from_type, to_type = kind & 255, (kind >> 8) & 255
    wide = _in_fours(source, from_type, f0, f1, f2, f3, n1, n2, n3)
    wide = wide & _in_fours(target, to_type, t0, t1, t2, t3, n1, n2, n3) & (n0 % 4 == 0)
    if (from_type == FLOAT64) | (to_type == FLOAT64):
        _move_singles(source, target, kind, first, total, n0, n1, n2, f0, f1, f2, f3, t0, t1, t2, t3, TILE, tl.float64)
    elif wide:
        _move_fours(source, target, kind, first, total, n0, n1, n2, f1, f2, f3, t1, t2, t3, TILE)
    else:
        _move_singles(source, target, kind, first, total, n0, n1, n2, f0, f1, f2, f3, t0, t1, t2, t3, TILE, tl.float32)


def launch_prefix_pack(table: Tensor, tiles: int, widths: Tensor | None = None) -> None:
    """Moves every entry of a table.

    Args:
        table: ``(entries + 1, 12)`` int64 as `prefix_pack_table` makes it, on the device.
        tiles: of all entries.
        widths: ``(entries, 2)`` int32 on the device, or None.
    """
    if tiles == 0:
        return
    entries = table.shape[0] - 1
    words = table.view(torch.int32)
    with torch.cuda.device_of(table) if table.is_cuda else contextlib.nullcontext():
        prefix_pack_kernel[(tiles,)](
            table,
            words,
            words if widths is None else widths,
            entries,
            entries.bit_length(),
            HAS_WIDTHS=widths is not None,
            TILE=TILE,
            num_warps=NUM_WARPS,
        )


def variants() -> list[Variant]:
    """Every program a launch can choose."""
    types = {"table": "*i64", "words": "*i32", "widths": "*i32", "entries": "i32", "steps": "i32"}
    return [
        Variant(
            name="widths" if has_widths else "full",
            kernel=prefix_pack_kernel,
            types=types,
            constants={"HAS_WIDTHS": has_widths, "TILE": TILE},
            divisible=("table", "words", "widths"),
            num_warps=NUM_WARPS,
        )
        for has_widths in (False, True)
    ]
