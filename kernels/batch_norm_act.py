"""Forward of batch_norm_act in Triton: y = act((x - mean) * invstd * weight + bias + residual).

Three kernels. Sums: every program takes each `chunks`-th tile of a block of channels and sums x - shift and its square
in float32, where shift is the mean of its first tile: exact whatever the mean. Finish: merges a channel's partial sums
in float64 (Chan, Golub & LeVeque 1979), updates the running statistics. Apply. There are no atomics: results repeat.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastslim.kernels.batch_norm_act_tiles import (
    NUM_WARPS,
    Tiling,
    accumulators,
    activate,
    channels_of,
    coefficients,
    sizes,
    tile,
    tiling_of,
    total,
)
from fastslim.kernels.variant import Variant

FINISH = {"CHUNKS": 128, "BLOCK": 8}  # partial sums a program loads at once: whole 32-byte sectors
FINISH_WARPS = 4
SIZES = ("outer", "channels", "inner", "blocks", "tiles", "chunks", "values")  # any number: no program of their own


@triton.jit(do_not_specialize=SIZES)
def batch_norm_act_fwd_sums_kernel(
    x,  # [outer, channels, inner]
    partial,  # [4, chunks, channels]: shift, count, sum, sum of squares
    outer,
    channels,
    inner,
    width,
    blocks,
    tiles,
    chunks,
    PLANES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Partial sums of one chunk and one block of channels."""
    channels, inner = sizes(channels, inner, width, PLANES, ALIGNED)
    block, chunk = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    c, active = channels_of(block, channels, PLANES, COLS)
    offsets, mask, count = tile(chunk, block, outer, channels, inner, PLANES, ROWS, COLS)
    shift = total(tl.load(x + offsets, mask, other=0).to(tl.float32), PLANES) / count
    sums = tl.zeros([ROWS, COLS], tl.float32)
    squares = tl.zeros([ROWS, COLS], tl.float32)
    values = 0
    for t in range(chunk, tiles, chunks):
        offsets, mask, count = tile(t, block, outer, channels, inner, PLANES, ROWS, COLS)
        d = tl.load(x + offsets, mask, other=0).to(tl.float32) - shift[None, :]
        d = tl.where(mask, d, 0.0)
        sums += d
        squares += d * d
        values += count
    plane = chunks.to(tl.int64) * channels
    partial += chunk.to(tl.int64) * channels + c
    tl.store(partial, shift, active)
    tl.store(partial + plane, tl.zeros_like(shift) + values, active)
    tl.store(partial + 2 * plane, total(sums, PLANES), active)
    tl.store(partial + 3 * plane, total(squares, PLANES), active)


@triton.jit(do_not_specialize=SIZES)
def batch_norm_act_fwd_finish_kernel(
    partial,  # [4, chunks, channels], or None: the running statistics normalise
    stats,  # [2, channels] float64: mean, 1 / sqrt(variance + eps)
    affine,  # [3, channels] float32: center, scale, shift
    weight,  # [channels], as all below, or None
    bias,
    running_mean,
    running_var,
    channels,
    width,
    chunks,
    values,
    momentum,
    eps,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics and coefficients of a few channels; running statistics."""
    if width is not None:
        channels = tl.load(width)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = c < channels
    mean = tl.zeros([BLOCK], tl.float64)
    variance = mean + 1
    if running_mean is not None:
        mean = tl.load(running_mean + c, active, other=0).to(tl.float64)
        variance = tl.load(running_var + c, active, other=1).to(tl.float64)
    if partial is not None:
        before, variance_before = mean, variance
        plane = chunks.to(tl.int64) * channels
        origin = tl.load(partial + c, active, other=0).to(tl.float64)
        sums = tl.zeros([CHUNKS, BLOCK], tl.float64)
        squares = tl.zeros([CHUNKS, BLOCK], tl.float64)
        for start in range(0, chunks, CHUNKS):
            chunk = start + tl.arange(0, CHUNKS)[:, None]
            at = partial + chunk.to(tl.int64) * channels + c[None, :]
            mask = (chunk < chunks) & active[None, :]
            # Empty for masked ones: their count and sums are 0.
            d = tl.load(at, mask, other=0).to(tl.float64) - origin[None, :]
            count = tl.load(at + plane, mask, other=0).to(tl.float64)
            s = tl.load(at + 2 * plane, mask, other=0).to(tl.float64)
            sums += s + count * d
            squares += tl.load(at + 3 * plane, mask, other=0).to(tl.float64) + d * (2 * s + count * d)
        n = tl.zeros([BLOCK], tl.float64) + values
        about = tl.sum(sums, 0) / n
        mean = origin + about
        variance = tl.sum(squares, 0) / n - about * about
        variance = tl.where(variance < 0, 0.0, variance)  # keeps NaN
        if running_mean is not None:
            m = tl.zeros([BLOCK], tl.float64) + momentum
            tl.store(running_mean + c, ((1 - m) * before + m * mean).to(tl.float32), active)
            unbiased = variance * (n / (n - 1))
            tl.store(running_var + c, ((1 - m) * variance_before + m * unbiased).to(tl.float32), active)
    invstd = 1 / tl.sqrt(variance + eps)
    tl.store(stats + c, mean, active)
    tl.store(stats + channels + c, invstd, active)
    center, scale, shift = coefficients(mean, invstd, weight, bias, c, active)
    tl.store(affine + c, center.to(tl.float32), active)
    tl.store(affine + channels + c, scale.to(tl.float32), active)
    tl.store(affine + 2 * channels + c, shift.to(tl.float32), active)


@triton.jit(do_not_specialize=SIZES)
def batch_norm_act_fwd_apply_kernel(
    x,  # [outer, channels, inner]
    affine,  # [3, channels]: center, scale, shift
    residual,  # like x, or None
    y,  # like x
    outer,
    channels,
    inner,
    width,
    blocks,
    tiles,
    PLANES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """One tile of y."""
    channels, inner = sizes(channels, inner, width, PLANES, ALIGNED)
    # Backwards: what the sums have read last is still in the cache.
    block, t = tl.program_id(0) % blocks, tiles - 1 - tl.program_id(0) // blocks
    c, active = channels_of(block, channels, PLANES, COLS)
    offsets, mask, _ = tile(t, block, outer, channels, inner, PLANES, ROWS, COLS)
    mask = mask & active[None, :]
    value = tl.load(x + offsets, mask, other=0).to(tl.float32)
    center = tl.load(affine + c, active, other=0)[None, :]
    scale = tl.load(affine + channels + c, active, other=0)[None, :]
    shift = tl.load(affine + 2 * channels + c, active, other=0)[None, :]
    z = (value - center) * scale + shift
    if residual is not None:
        z += tl.load(residual + offsets, mask, other=0).to(tl.float32)
    tl.store(y + offsets, activate(z, ACTIVATION).to(y.dtype.element_ty), mask)


def launch_batch_norm_act_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    activation: int,
    width: Tensor | None = None,
    width_multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    """Normalises, adds, activates; updates the running statistics in training.

    Args:
        x: ``(N, C, ...)``, contiguous or channels_last.
        weight: at least `C` values, contiguous, as bias and running statistics; or None.
        bias: as weight.
        running_mean: as weight.
        running_var: as weight.
        residual: like x, or None.
        training: statistics of the batch.
        momentum: share of the batch in the running statistics.
        eps: added to the variance.
        activation: 0 to 4: none, relu, relu6, silu, hardswish.
        width: one int32 on x's device, the number of channels, at most `C`: x, y and residual then hold
            dense tensors of that many channels at the start of their memory, stats ``(2, width)``.
        width_multiple: what `width` is known to be a multiple of; with 8, rows are read 16 bytes at a time.

    Returns:
        y, and stats ``(2, C)`` float64: mean and 1 / sqrt(variance + eps).
    """
    y, stats = torch.empty_like(x), x.new_empty(2, x.shape[1], dtype=torch.float64)
    if not x.shape[1]:
        return y, stats
    tiling = tiling_of(x, width, width_multiple)
    affine = accumulators(3, x.shape[1], like=x)
    partial = _sums(x, tiling) if training and x.numel() else None
    batch_norm_act_fwd_finish_kernel[(triton.cdiv(tiling.channels, FINISH["BLOCK"]),)](
        partial, stats, affine, weight, bias, running_mean, running_var, tiling.channels, width, tiling.chunks,
        tiling.outer * tiling.inner, momentum, eps, **FINISH, num_warps=FINISH_WARPS,
    )  # fmt: skip
    if x.numel():
        batch_norm_act_fwd_apply_kernel[(tiling.blocks * tiling.tiles,)](
            x, affine, residual, y, **tiling.arguments(), ACTIVATION=activation
        )
    return y, stats


def _sums(x: Tensor, tiling: Tiling) -> Tensor:
    partial = accumulators(4, tiling.chunks, tiling.channels, like=x)
    batch_norm_act_fwd_sums_kernel[(tiling.blocks * tiling.chunks,)](
        x, partial, **tiling.arguments(), chunks=tiling.chunks
    )
    return partial


def tile_constants(planes: bool, cols: int, **others: object) -> dict[str, object]:
    """Constants of a program over aligned tiles whose width the host knows."""
    return {"width": None, "PLANES": planes, "ALIGNED": True, "ROWS": 4096 // cols, "COLS": cols, **others}


def variants() -> list[Variant]:
    """Rows of 64 channels and more, planes, and the activations: cheap, costly, with a residual."""
    sizes = dict.fromkeys(SIZES, "i32")
    found = []
    for dtype, name in (("*bf16", "bf16"), ("*fp32", "fp32")):
        for planes in (False, True) if name == "bf16" else (False,):
            types = {"x": dtype, "partial": "*fp32", **sizes}
            constants = tile_constants(planes, 512 if planes else 128)
            found.append(
                Variant(f"{name}-{'planes' if planes else 'rows'}", batch_norm_act_fwd_sums_kernel, types, constants,
                        ("x", "partial"), num_warps=NUM_WARPS)
            )  # fmt: skip
    pointers = ("x", "affine", "residual", "y")
    for dtype, name, planes, activation, residual in (
        ("*bf16", "bf16-rows-relu", False, 1, False),
        ("*bf16", "bf16-rows-relu-residual", False, 1, True),
        ("*bf16", "bf16-rows-silu", False, 3, False),
        ("*bf16", "bf16-planes-relu", True, 1, False),
        ("*fp32", "fp32-rows-hardswish-residual", False, 4, True),
    ):
        types = {"x": dtype, "affine": "*fp32", "residual": dtype, "y": dtype, **sizes}
        constants = tile_constants(planes, 512 if planes else 128, ACTIVATION=activation)
        if not residual:
            constants["residual"] = None
        divisible = tuple(name for name in pointers if name not in constants)
        found.append(Variant(name, batch_norm_act_fwd_apply_kernel, types, constants, divisible, num_warps=NUM_WARPS))
    types = dict.fromkeys(("partial", "affine", "weight", "bias", "running_mean", "running_var"), "*fp32")
    types |= {"stats": "*fp64", "momentum": "fp32", "eps": "fp32", **sizes}
    found.append(
        Variant("training", batch_norm_act_fwd_finish_kernel, types, {"width": None, **FINISH}, tuple(types)[:6],
                bound="latency", num_warps=FINISH_WARPS)
    )  # fmt: skip
    return found
