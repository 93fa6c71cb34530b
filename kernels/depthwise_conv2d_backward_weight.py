"""Weight gradient of the depthwise convolution in Triton, in two stages of fixed order (no atomics).

partials[chunk, kh*K + kw, c] = sum over a chunk's pixels of grad_y[n, oh, ow, c] * x'[n, oh*s-p+kh, ow*s-p+kw, c], and
partials[chunk, K*K, c] that of grad_y; the second stage adds the chunks in float64 and writes, or adds to, the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastslim.kernels.depthwise_conv2d import (
    BLOCK_CHANNELS,
    BLOCK_PIXELS,
    BLOCKS,
    SIZES,
    cases,
    label,
    multiple_of,
    normalised,
)
from fastslim.kernels.variant import Variant

FINISH_CHUNKS, FINISH_CHANNELS = 32, 32
#: Program chunks of a weight gradient: enough for every multiprocessor, few enough to merge quickly.
WEIGHT_CHUNKS = 132 * 2


@triton.jit(
    do_not_specialize=["total", "units", "count_units", "in_h", "in_w", "out_h", "out_w", "chunk", "pad_h", "pad_w"]
)
def depthwise_conv2d_bwd_weight_kernel(
    grad_y,  # [N, Ho, Wo, C]
    x,  # [N, H, W, C]
    prologue,  # [3, C]
    partials,  # [chunks, K * K + 1, count]
    total,  # N * Ho * Wo
    units,
    count_units,
    in_h,
    in_w,
    out_h,
    out_w,
    chunk,
    stride,
    pad_h,
    pad_w,
    low,
    high,
    K,
    MULTIPLE: tl.constexpr,
    PROLOGUE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (chunks, blocks of channels, taps and one more for the bias)."""
    channels, count = units * MULTIPLE, count_units * MULTIPLE
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    active = c < count
    kh = tl.program_id(2) // K
    kw = tl.program_id(2) % K
    is_bias = kh == K
    begin = tl.program_id(0).to(tl.int64) * chunk
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for block in range(0, chunk, BLOCK_P):
        within = block + tl.arange(0, BLOCK_P)
        pixel = begin + within
        exists = (within < chunk) & (pixel < total)
        ow = (pixel % out_w).to(tl.int32)
        image_row = pixel // out_w
        oh = (image_row % out_h).to(tl.int32)
        n = image_row // out_h
        written = exists[:, None] & active[None, :]
        g = tl.load(grad_y + (pixel * channels)[:, None] + c[None, :], mask=written, other=0.0).to(tl.float32)
        ih = oh * stride - pad_h + kh
        iw = ow * stride - pad_w + kw
        inside = exists & (ih >= 0) & (ih < in_h) & (iw >= 0) & (iw < in_w) & (kh < K)
        mask = inside[:, None] & active[None, :]
        source = ((n * in_h + ih) * in_w + iw) * channels
        v = tl.load(x + source[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if PROLOGUE:
            v = normalised(v, mask, prologue, c, active, channels, low, high)
        acc += g * tl.where(is_bias, 1.0, v)
    target = partials + (tl.program_id(0).to(tl.int64) * (K * K + 1) + tl.program_id(2)) * count + c
    tl.store(target, tl.sum(acc, 0), mask=active)


@triton.jit(do_not_specialize=["chunks", "count", "K"])
def depthwise_conv2d_bwd_weight_finish_kernel(
    partials,  # [chunks, K * K + 1, count]
    grad_weight,  # [count, 1, K, K], strided
    grad_bias,  # [count], strided
    chunks,
    count,
    row,
    tap_h,
    tap_w,
    bias_stride,
    add_weight,
    add_bias,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (blocks of channels, taps and one more for the bias)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    active = c < count
    tap = tl.program_id(1)
    is_bias = tap == K * K
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float64)
    for block in range(0, chunks, BLOCK_M):
        m = block + tl.arange(0, BLOCK_M)
        mask = (m < chunks)[:, None] & active[None, :]
        source = (m.to(tl.int64) * (K * K + 1) + tap) * count
        acc += tl.load(partials + source[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float64)
    total = tl.sum(acc, 0)
    if is_bias:
        target = grad_bias + c * bias_stride
        before = tl.load(target, mask=active & (add_bias != 0), other=0.0).to(tl.float64)
        tl.store(target, (before + total).to(tl.float32), mask=active)
    else:
        target = grad_weight + c * row + tap // K * tap_h + tap % K * tap_w
        before = tl.load(target, mask=active & (add_weight != 0), other=0.0).to(tl.float64)
        tl.store(target, (before + total).to(tl.float32), mask=active)


def launch_depthwise_conv2d_bwd_weight(
    grad_y: Tensor,
    x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    prologue: Tensor | None,
    channels: int,
    conv: tuple[int, int, int],
    clamp: tuple[float, float],
    add_weight: bool,
    add_bias: bool,
) -> None:
    """Writes one segment's gradients, float32 ``(count, 1, K, K)`` and ``(count,)``, or adds to them."""
    count, (n, _, out_h, out_w) = grad_weight.shape[0], grad_y.shape
    if count == 0:
        return
    total, kernel, multiple = n * out_h * out_w, grad_weight.shape[2], multiple_of(x, channels, count)
    stride, pad_h, pad_w = conv
    chunk = max(BLOCK_PIXELS, triton.cdiv(triton.cdiv(total, WEIGHT_CHUNKS), BLOCK_PIXELS) * BLOCK_PIXELS)
    chunks, taps = triton.cdiv(total, chunk), kernel**2 + (grad_bias is not None)
    partials = torch.empty((chunks, kernel**2 + 1, count), dtype=torch.float32, device=x.device)
    if chunks:
        depthwise_conv2d_bwd_weight_kernel[(chunks, triton.cdiv(count, BLOCK_CHANNELS), taps)](
            grad_y, x, x if prologue is None else prologue, partials, total, channels // multiple, count // multiple,
            *x.shape[2:], out_h, out_w, chunk, stride, pad_h, pad_w, *clamp, kernel, MULTIPLE=multiple,
            PROLOGUE=prologue is not None, BLOCK_P=BLOCK_PIXELS, BLOCK_C=BLOCK_CHANNELS,
        )  # fmt: skip
    depthwise_conv2d_bwd_weight_finish_kernel[(triton.cdiv(count, FINISH_CHANNELS), taps)](
        partials, grad_weight, grad_weight if grad_bias is None else grad_bias, chunks, count, grad_weight.stride(0),
        grad_weight.stride(2), grad_weight.stride(3), 1 if grad_bias is None else grad_bias.stride(0),
        int(add_weight), int(add_bias), kernel, BLOCK_M=FINISH_CHUNKS, BLOCK_C=FINISH_CHANNELS,
    )  # fmt: skip


def variants() -> list[Variant]:
    """The same cases as the forward kernel's, and the second stage."""
    found = []
    for dtype, fused, multiple in cases():
        types = {**dict.fromkeys((*SIZES, "stride"), "i32"), "low": "fp32", "high": "fp32"}
        types |= {"grad_y": f"*{dtype}", "x": f"*{dtype}", "partials": "*fp32"}
        types["prologue"] = "*fp32" if fused else f"*{dtype}"
        constants = {"MULTIPLE": multiple, "PROLOGUE": fused, **BLOCKS}
        images, bound = ("grad_y", "x", "prologue", "partials"), "memory" if multiple > 1 else "latency"
        name = label(dtype, fused, multiple)
        found.append(Variant(name, depthwise_conv2d_bwd_weight_kernel, types, constants, images, bound))
    numbers = ("chunks", "count", "row", "tap_h", "tap_w", "bias_stride", "add_weight", "add_bias", "K")
    types = dict.fromkeys(numbers, "i32") | dict.fromkeys(("partials", "grad_weight", "grad_bias"), "*fp32")
    constants = {"BLOCK_M": FINISH_CHUNKS, "BLOCK_C": FINISH_CHANNELS}
    finish = depthwise_conv2d_bwd_weight_finish_kernel
    return [*found, Variant("fp32", finish, types, constants, bound="latency")]
