"""Backward of batch_norm_act in Triton; z is computed again, nothing of x's size was kept but x (and y or residual).

dz = dy * act'(z); dresidual = dz; dbias = sum(dz); dweight = invstd * sum(dz * (x - mean));
dx = weight * invstd * (dz - dbias / n - (x - mean) * invstd * dweight / n), in evaluation without the last two terms.
Three kernels as in the forward: sums of a chunk in float32, merged per channel in float64, then dx.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastslim.kernels.batch_norm_act import FINISH, FINISH_WARPS, SIZES, tile_constants
from fastslim.kernels.batch_norm_act_tiles import (
    NUM_WARPS,
    RELU,
    RELU6,
    accumulators,
    activate_backward,
    channels_of,
    coefficients,
    sizes,
    tile,
    tiling_of,
    total,
)
from fastslim.kernels.variant import Variant


@triton.jit
def _gradient_of_z(dy, centered, extra, scale, shift, offsets, mask, ACTIVATION: tl.constexpr):
    """The gradient dz [ROWS, COLS]; `extra` is y for relu and relu6, the residual for the others."""
    dz = tl.load(dy + offsets, mask, other=0).to(tl.float32)
    if extra is None:
        z = centered * scale + shift
    else:
        z = tl.load(extra + offsets, mask, other=0).to(tl.float32)
        if ACTIVATION != RELU and ACTIVATION != RELU6:
            z += centered * scale + shift
    return activate_backward(dz, z, ACTIVATION)


@triton.jit(do_not_specialize=SIZES)
def batch_norm_act_bwd_sums_kernel(
    dy,  # [outer, channels, inner]
    x,  # like dy
    extra,  # like dy, or None
    stats,  # [2, channels] float64
    weight,  # [channels], or None
    bias,  # [channels], or None
    partial,  # [2, chunks, channels]: sum of dz, sum of dz * (x - center)
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
    ACTIVATION: tl.constexpr,
):
    """Partial sums of one chunk and one block of channels."""
    channels, inner = sizes(channels, inner, width, PLANES, ALIGNED)
    block, chunk = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    c, active = channels_of(block, channels, PLANES, COLS)
    mean = tl.load(stats + c, active, other=0)
    invstd = tl.load(stats + channels + c, active, other=0)
    center, scale, shift = coefficients(mean, invstd, weight, bias, c, active)
    center = center.to(tl.float32)[None, :]
    scale = scale.to(tl.float32)[None, :]
    shift = shift.to(tl.float32)[None, :]
    sums = tl.zeros([ROWS, COLS], tl.float32)
    products = tl.zeros([ROWS, COLS], tl.float32)
    for t in range(chunk, tiles, chunks):
        offsets, mask, _ = tile(t, block, outer, channels, inner, PLANES, ROWS, COLS)
        mask = mask & active[None, :]
        centered = tl.load(x + offsets, mask, other=0).to(tl.float32) - center
        dz = _gradient_of_z(dy, centered, extra, scale, shift, offsets, mask, ACTIVATION)
        dz = tl.where(mask, dz, 0.0)
        sums += dz
        products += dz * centered
    partial += chunk.to(tl.int64) * channels + c
    tl.store(partial, total(sums, PLANES), active)
    tl.store(partial + chunks.to(tl.int64) * channels, total(products, PLANES), active)


@triton.jit(do_not_specialize=SIZES)
def batch_norm_act_bwd_finish_kernel(
    partial,  # [2, chunks, channels], or None: no sums are wanted, the gradients are 0
    stats,  # [2, channels] float64
    weight,  # [channels], or None
    bias,  # [channels], or None
    dweight,  # [channels] float32
    dbias,  # [channels] float32
    # [5, channels] float32: center, scale, shift, slope, offset: dx = dz * scale + (x - center) * slope + offset
    affine,
    channels,
    width,
    chunks,
    values,
    TRAINING: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of weight and bias and coefficients of a few channels."""
    if width is not None:
        channels = tl.load(width)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = c < channels
    mean = tl.load(stats + c, active, other=0)
    invstd = tl.load(stats + channels + c, active, other=0)
    center, scale, shift = coefficients(mean, invstd, weight, bias, c, active)
    db = tl.zeros([BLOCK], tl.float64)
    dw = tl.zeros([BLOCK], tl.float64)
    if partial is not None:
        sums = tl.zeros([CHUNKS, BLOCK], tl.float64)
        products = tl.zeros([CHUNKS, BLOCK], tl.float64)
        for start in range(0, chunks, CHUNKS):
            chunk = start + tl.arange(0, CHUNKS)[:, None]
            at = partial + chunk.to(tl.int64) * channels + c[None, :]
            mask = (chunk < chunks) & active[None, :]
            sums += tl.load(at, mask, other=0).to(tl.float64)
            products += tl.load(at + chunks.to(tl.int64) * channels, mask, other=0).to(tl.float64)
        db = tl.sum(sums, 0)
        dw = (tl.sum(products, 0) + (center - mean) * db) * invstd
    tl.store(dbias + c, db.to(tl.float32), active)
    tl.store(dweight + c, dw.to(tl.float32), active)
    tl.store(affine + c, center.to(tl.float32), active)
    tl.store(affine + channels + c, scale.to(tl.float32), active)
    tl.store(affine + 2 * channels + c, shift.to(tl.float32), active)
    if TRAINING:
        n = tl.zeros([BLOCK], tl.float64) + values
        slope = -scale * invstd * dw / n
        offset = (center - mean) * slope - scale * db / n
        tl.store(affine + 3 * channels + c, slope.to(tl.float32), active)
        tl.store(affine + 4 * channels + c, offset.to(tl.float32), active)


@triton.jit(do_not_specialize=SIZES)
def batch_norm_act_bwd_apply_kernel(
    dy,  # [outer, channels, inner], as all but affine
    x,
    extra,  # or None
    affine,  # [5, channels]
    dx,
    dresidual,  # or None
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
    TRAINING: tl.constexpr,
):
    """One tile of dx, and of the residual's gradient."""
    channels, inner = sizes(channels, inner, width, PLANES, ALIGNED)
    # Backwards: what the sums have read last is still in the cache.
    block, t = tl.program_id(0) % blocks, tiles - 1 - tl.program_id(0) // blocks
    c, active = channels_of(block, channels, PLANES, COLS)
    offsets, mask, _ = tile(t, block, outer, channels, inner, PLANES, ROWS, COLS)
    mask = mask & active[None, :]
    center = tl.load(affine + c, active, other=0)[None, :]
    scale = tl.load(affine + channels + c, active, other=0)[None, :]
    shift = tl.load(affine + 2 * channels + c, active, other=0)[None, :]
    centered = tl.load(x + offsets, mask, other=0).to(tl.float32) - center
    dz = _gradient_of_z(dy, centered, extra, scale, shift, offsets, mask, ACTIVATION)
    if dresidual is not None:
        tl.store(dresidual + offsets, dz.to(dresidual.dtype.element_ty), mask)
    result = dz * scale
    if TRAINING:
        slope = tl.load(affine + 3 * channels + c, active, other=0)[None, :]
        offset = tl.load(affine + 4 * channels + c, active, other=0)[None, :]
        result += centered * slope + offset
    tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask)


def launch_batch_norm_act_bwd(
    dy: Tensor,
    x: Tensor,
    extra: Tensor | None,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    training: bool,
    activation: int,
    want_residual: bool,
    want_parameters: bool,
    width: Tensor | None = None,
    width_multiple: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the forward; tensors, `width` and `width_multiple` are as there.

    Args:
        dy: gradient of y, like x.
        x: as in the forward.
        extra: with a residual: y for relu and relu6, the residual for the other activations.
        stats: what the forward returned.
        weight: as in the forward.
        bias: as in the forward.
        training: as in the forward.
        activation: as in the forward.
        want_residual: the gradient of the residual is wanted.
        want_parameters: the gradients of weight or bias are wanted; in training they are made anyway, else 0.

    Returns:
        dx, dresidual (empty unless wanted), dweight and dbias ``(C,)`` float32.
    """
    channels = x.shape[1]
    dx, dresidual = torch.empty_like(x), torch.empty_like(x) if want_residual else x.new_empty(0)
    dweight, dbias, affine = (accumulators(*shape, like=x) for shape in ((channels,), (channels,), (5, channels)))
    if not channels:
        return dx, dresidual, dweight, dbias
    tiling = tiling_of(x, width, width_multiple)
    partial = None
    if x.numel() and (training or want_parameters):
        partial = accumulators(2, tiling.chunks, channels, like=x)
        batch_norm_act_bwd_sums_kernel[(tiling.blocks * tiling.chunks,)](
            dy, x, extra, stats, weight, bias, partial,
            **tiling.arguments(), chunks=tiling.chunks, ACTIVATION=activation,
        )  # fmt: skip
    batch_norm_act_bwd_finish_kernel[(triton.cdiv(channels, FINISH["BLOCK"]),)](
        partial, stats, weight, bias, dweight, dbias, affine, channels, width, tiling.chunks,
        tiling.outer * tiling.inner, TRAINING=training and x.numel() > 0, **FINISH, num_warps=FINISH_WARPS,
    )  # fmt: skip
    if x.numel():
        batch_norm_act_bwd_apply_kernel[(tiling.blocks * tiling.tiles,)](
            dy, x, extra, affine, dx, dresidual if want_residual else None,
            **tiling.arguments(), ACTIVATION=activation, TRAINING=training,
        )  # fmt: skip
    return dx, dresidual, dweight, dbias


def variants() -> list[Variant]:
    """As of the forward: rows, planes; activations told from x, from y, and from x and the residual."""
    vectors = dict.fromkeys(("partial", "weight", "bias", "dweight", "dbias", "affine"), "*fp32")
    others = {**vectors, "stats": "*fp64", **dict.fromkeys(SIZES, "i32")}
    found = []
    for dtype, name, planes, activation, residual in (
        ("*bf16", "bf16-rows-relu", False, 1, False),
        ("*bf16", "bf16-rows-relu-residual", False, 1, True),
        ("*bf16", "bf16-planes-silu", True, 3, False),
        ("*fp32", "fp32-rows-hardswish-residual", False, 4, True),
    ):
        types = {**dict.fromkeys(("dy", "x", "extra", "dx", "dresidual"), dtype), **others}
        constants = tile_constants(planes, 512 if planes else 128, ACTIVATION=activation)
        if not residual:
            constants |= {"extra": None, "dresidual": None}
        for kernel in (batch_norm_act_bwd_sums_kernel, batch_norm_act_bwd_apply_kernel):
            of_kernel = {k: v for k, v in {**constants, "TRAINING": True}.items() if k in kernel.arg_names}
            divisible = tuple(k for k in kernel.arg_names if types.get(k, "").startswith("*") and k not in of_kernel)
            found.append(Variant(name, kernel, types, of_kernel, divisible, num_warps=NUM_WARPS))
    kernel = batch_norm_act_bwd_finish_kernel
    divisible = tuple(k for k in kernel.arg_names if others.get(k, "").startswith("*"))
    constants = {"width": None, "TRAINING": True, **FINISH}
    found.append(Variant("training", kernel, others, constants, divisible, "latency", FINISH_WARPS))
    return found
