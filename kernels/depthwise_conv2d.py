"""Depthwise convolution of channels_last images in Triton: a block of pixels times a block of channels a program.

y[n, oh, ow, c] = b[c] + sum_{kh,kw} w[c, kh, kw] * x'[n, oh*s - p + kh, ow*s - p + kw, c], x' the prologue's output;
the input gradient gathers grad_y. The weight gradient is in depthwise_conv2d_backward_weight.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastslim.kernels.variant import Variant

BLOCK_PIXELS, BLOCK_CHANNELS = 32, 64
BLOCKS = {"BLOCK_P": BLOCK_PIXELS, "BLOCK_C": BLOCK_CHANNELS}
ITEM_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
#: Arguments that change from call to call: specialised programs would be compiled again and again.
SIZES = ["total", "units", "count_units", "in_h", "in_w", "out_h", "out_w", "pad_h", "pad_w", "chunk", "K"]


@triton.jit
def normalised(x, inside, prologue, c, active, channels, low, high):
    """The prologue's output in float32, 0 where there is no pixel."""
    center = tl.load(prologue + c, mask=active, other=0.0)
    scale = tl.load(prologue + channels + c, mask=active, other=0.0)
    shift = tl.load(prologue + 2 * channels + c, mask=active, other=0.0)
    value = (x - center[None, :]) * scale[None, :] + shift[None, :]
    value = tl.where(value < low, low, tl.where(value > high, high, value))  # NaN stays NaN
    return tl.where(inside, value, 0.0)


@triton.jit(
    do_not_specialize=["total", "units", "count_units", "in_h", "in_w", "out_h", "out_w", "chunk", "pad_h", "pad_w"]
)
def depthwise_conv2d_fwd_kernel(
    x,  # [N, H, W, C]
    weight,  # [count, 1, K, K], strided
    bias,  # [count], strided
    prologue,  # [3, C]
    y,  # [N, Ho, Wo, C]
    partials,  # [chunks, 3, C]
    total,  # N * Ho * Wo
    units,  # C / MULTIPLE
    count_units,  # the same of the channels of this segment, which each pointer starts at
    in_h,
    in_w,
    out_h,
    out_w,
    chunk,  # output pixels of a chunk
    stride,
    pad_h,
    pad_w,
    row,
    tap_h,
    tap_w,
    K,
    bias_stride,
    low,
    high,
    MULTIPLE: tl.constexpr,
    BIAS: tl.constexpr,
    PROLOGUE: tl.constexpr,
    STATISTICS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (chunks, blocks of channels)."""
    channels, count = units * MULTIPLE, count_units * MULTIPLE
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    active = c < count
    begin = tl.program_id(0).to(tl.int64) * chunk
    first = tl.zeros((BLOCK_C,), tl.float32)
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    offset = tl.zeros((BLOCK_C,), tl.float32)
    if BIAS:
        offset += tl.load(bias + c * bias_stride, mask=active, other=0.0).to(tl.float32)
    for block in range(0, chunk, BLOCK_P):
        within = block + tl.arange(0, BLOCK_P)
        pixel = begin + within
        exists = (within < chunk) & (pixel < total)
        ow = (pixel % out_w).to(tl.int32)
        image_row = pixel // out_w
        oh = (image_row % out_h).to(tl.int32)
        n = image_row // out_h
        acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32) + offset[None, :]
        for tap in range(K * K):  # a loop: unrolled, all loads would be in registers at once
            ih = oh * stride - pad_h + tap // K
            iw = ow * stride - pad_w + tap % K
            inside = (exists & (ih >= 0) & (ih < in_h) & (iw >= 0) & (iw < in_w))[:, None] & active[None, :]
            source = ((n * in_h + ih) * in_w + iw) * channels
            v = tl.load(x + source[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
            if PROLOGUE:
                v = normalised(v, inside, prologue, c, active, channels, low, high)
            w = tl.load(weight + c * row + tap // K * tap_h + tap % K * tap_w, mask=active, other=0.0).to(tl.float32)
            acc += v * w[None, :]
        written = exists[:, None] & active[None, :]
        rounded = acc.to(y.dtype.element_ty)
        tl.store(y + (pixel * channels)[:, None] + c[None, :], rounded, mask=written)
        if STATISTICS:
            value = rounded.to(tl.float32)
            if block == 0:
                first = tl.sum(tl.where((within == 0)[:, None], value, 0.0), 0)
            difference = tl.where(written, value - first[None, :], 0.0)
            sums += difference
            squares += difference * difference
    if STATISTICS:
        partial = partials + tl.program_id(0).to(tl.int64) * 3 * channels + c
        tl.store(partial, first, mask=active)
        tl.store(partial + channels, tl.sum(sums, 0), mask=active)
        tl.store(partial + 2 * channels, tl.sum(squares, 0), mask=active)


@triton.jit(do_not_specialize=[name for name in SIZES if name != "chunk"])
def depthwise_conv2d_bwd_input_kernel(
    grad_y,  # [N, Ho, Wo, C]
    weight,  # [count, 1, K, K], strided
    grad_x,  # [N, H, W, C]
    total,  # N * H * W
    units,
    count_units,
    in_h,
    in_w,
    out_h,
    out_w,
    pad_h,
    pad_w,
    row,
    tap_h,
    tap_w,
    K,
    STRIDE: tl.constexpr,
    MULTIPLE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (blocks of pixels, blocks of channels)."""
    channels, count = units * MULTIPLE, count_units * MULTIPLE
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    active = c < count
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = pixel < total
    iw = (pixel % in_w).to(tl.int32)
    image_row = pixel // in_w
    ih = (image_row % in_h).to(tl.int32)
    n = image_row // in_h
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tap in range(K * K):
        h = ih + pad_h - tap // K
        w_position = iw + pad_w - tap % K
        oh, ow = h // STRIDE, w_position // STRIDE
        inside = exists & (h >= 0) & (w_position >= 0) & (oh < out_h) & (ow < out_w)
        if STRIDE == 2:
            inside = inside & (h % 2 == 0) & (w_position % 2 == 0)
        source = ((n * out_h + oh) * out_w + ow) * channels
        mask = inside[:, None] & active[None, :]
        g = tl.load(grad_y + source[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + c * row + tap // K * tap_h + tap % K * tap_w, mask=active, other=0.0).to(tl.float32)
        acc += g * w[None, :]
    written = exists[:, None] & active[None, :]
    tl.store(grad_x + (pixel * channels)[:, None] + c[None, :], acc.to(grad_x.dtype.element_ty), mask=written)


def launch_depthwise_conv2d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prologue: Tensor | None,
    y: Tensor,
    partials: Tensor | None,
    channels: int,
    chunk: int,
    conv: tuple[int, int, int],
    clamp: tuple[float, float],
) -> None:
    """Convolves one segment: `x`, `y`, `prologue` and `partials` start at its first channel, `weight` is cut to it.

    Args:
        x: ``(N, C, H, W)`` channels_last, perhaps from a channel on.
        weight: ``(count, 1, K, K)``.
        bias: ``(count,)`` or None.
        prologue: ``(3, C)`` float32 or None.
        y: output.
        partials: ``(chunks, 3, C)`` float32 or None.
        channels: `C`, of all segments.
        chunk: output pixels of a chunk.
        conv: stride and the two paddings.
        clamp: bounds of the prologue's output.
    """
    count, (n, _, out_h, out_w) = weight.shape[0], y.shape
    total, multiple, (stride, pad_h, pad_w) = n * out_h * out_w, multiple_of(x, channels, count), conv
    if total == 0 or count == 0:
        return
    depthwise_conv2d_fwd_kernel[(triton.cdiv(total, chunk), triton.cdiv(count, BLOCK_CHANNELS))](
        x, weight, weight if bias is None else bias, x if prologue is None else prologue, y,
        x if partials is None else partials, total, channels // multiple, count // multiple, *x.shape[2:],
        out_h, out_w, chunk, stride, pad_h, pad_w, weight.stride(0), weight.stride(2), weight.stride(3),
        weight.shape[2], 1 if bias is None else bias.stride(0), *clamp, MULTIPLE=multiple, BIAS=bias is not None,
        PROLOGUE=prologue is not None, STATISTICS=partials is not None, BLOCK_P=BLOCK_PIXELS, BLOCK_C=BLOCK_CHANNELS,
    )  # fmt: skip


def launch_depthwise_conv2d_bwd_input(
    grad_y: Tensor, weight: Tensor, grad_x: Tensor, channels: int, conv: tuple[int, int, int]
) -> None:
    """Input gradient of one segment; see :func:`launch_depthwise_conv2d_fwd`."""
    count, (n, _, in_h, in_w) = weight.shape[0], grad_x.shape
    total, multiple, (stride, pad_h, pad_w) = n * in_h * in_w, multiple_of(grad_y, channels, count), conv
    if total == 0 or count == 0:
        return
    depthwise_conv2d_bwd_input_kernel[(triton.cdiv(total, BLOCK_PIXELS), triton.cdiv(count, BLOCK_CHANNELS))](
        grad_y, weight, grad_x, total, channels // multiple, count // multiple, in_h, in_w, *grad_y.shape[2:],
        pad_h, pad_w, weight.stride(0), weight.stride(2), weight.stride(3), weight.shape[2], STRIDE=stride,
        MULTIPLE=multiple, BLOCK_P=BLOCK_PIXELS, BLOCK_C=BLOCK_CHANNELS,
    )  # fmt: skip


def multiple_of(x: Tensor, *channels: int) -> int:
    """What the kernels may count on: numbers of channels are multiples of a 16-byte vector, or of nothing."""
    vector = 16 // x.element_size()
    return vector if all(number % vector == 0 for number in channels) else 1


def variants() -> list[Variant]:
    """Programs of every type, with and without what is fused, for whole vectors of channels and for odd widths."""
    found = []
    for dtype, fused, multiple in cases():
        pointer, other = f"*{dtype}", "*fp32" if fused else f"*{dtype}"
        constants = {"MULTIPLE": multiple, **BLOCKS}
        strides = dict.fromkeys(("row", "tap_h", "tap_w"), "i32")
        types = {**dict.fromkeys(SIZES, "i32"), **strides, "weight": pointer}
        forward = {**types, "x": pointer, "y": pointer, "bias": pointer, "prologue": other, "partials": other}
        forward |= {"low": "fp32", "high": "fp32", **dict.fromkeys(("stride", "bias_stride"), "i32")}
        flags = {"BIAS": False, "PROLOGUE": fused, "STATISTICS": fused}
        images, bound = ("x", "y", "prologue", "partials"), "memory" if multiple > 1 else "latency"
        name = label(dtype, fused, multiple)
        found.append(Variant(name, depthwise_conv2d_fwd_kernel, forward, {**constants, **flags}, images, bound))
        for stride in (1, 2) if not fused else ():
            gradients = {argument: of for argument, of in types.items() if argument != "chunk"}
            gradients |= {"grad_y": pointer, "grad_x": pointer}
            kind, kernel = {**constants, "STRIDE": stride}, depthwise_conv2d_bwd_input_kernel
            found.append(Variant(f"{name}-stride{stride}", kernel, gradients, kind, ("grad_y", "grad_x"), bound))
    return found


def cases() -> list[tuple[str, bool, int]]:
    """Type, fusion and divisor of the widths of the programs that are compiled without a GPU."""
    whole = [(dtype, fused, 16 // ITEM_SIZES[dtype]) for dtype in ITEM_SIZES for fused in (False, True)]
    return [*whole, ("bf16", False, 1)]


def label(dtype: str, fused: bool, multiple: int) -> str:
    """A case as a name."""
    return f"{dtype}{'-fused' if fused else ''}{'' if multiple > 1 else '-odd'}"
