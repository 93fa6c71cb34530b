"""Who computes a direction of depthwise_conv2d: times on a CPU, estimates and recorded tables on a GPU."""

from __future__ import annotations

import torch

from fastslim.ops import backend
from fastslim.ops.depthwise_conv2d_library import Pair

_CPP = backend.Choice("cpp", "our kernel is as fast or faster (measured)")
_LIBRARY = backend.Choice("library", "oneDNN is faster here (measured)")
_SCALAR = "our kernels for this form take one thread an element: estimated slower than cuDNN"
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SEGMENTS = 64  # the CUDA kernels take them by value (csrc/include/fastslim/depthwise_conv2d_cuda.h)
_ONE = (1, 1)


def rule(
    target: str,
    dtype: torch.dtype,
    direction: str = "forward",
    channels_last: bool = True,
    kernel: Pair = (3, 3),
    stride: Pair = _ONE,
    dilation: Pair = _ONE,
    multiplier: int = 1,
    segments: int = 1,
    channels: int = 0,
    pixels: int = 0,
) -> backend.Choice:
    """The natural choice; `segments` is their number, `pixels` those of the batch."""
    if target == "cpu":
        if dtype not in _CPU_DTYPES:
            return backend.Choice("library", f"our kernels compute float32, bfloat16 and float64, not {dtype}")
        return _measured(direction, dtype, channels_last, kernel, stride, dilation, multiplier)
    call = direction, channels_last, kernel, stride, dilation, multiplier, segments
    refusals = {name: refuses(name, target, dtype, *call) for name in ("cuda", "triton")}
    kernels = tuple(name for name, reason in refusals.items() if reason is None)
    reasons = [f"{name} {reason}" for name, reason in refusals.items() if reason is not None]
    vectors = has_vectors(channels_last, kernel, stride, dilation, multiplier) and dtype != torch.float64
    return backend.gpu_choice(
        f"depthwise_conv2d_{direction}",
        target,
        dtype,
        kernels=kernels if vectors else ("library", *kernels),
        otherwise=backend.Choice("library", "; ".join(reasons if vectors else [_SCALAR, *reasons])),
        exact=(
            "x".join(map(str, kernel)),
            "stride",
            "x".join(map(str, stride)),
            "channels_last" if channels_last else "contiguous",
            *(("general",) if dilation != _ONE or multiplier != 1 else ()),
        ),
        sizes=(channels, pixels),
    )


def has_vectors(channels_last: bool, kernel: Pair, stride: Pair, dilation: Pair, multiplier: int) -> bool:
    """Whether a call has the form our fast GPU kernels are made for."""
    square = kernel in ((3, 3), (5, 5), (7, 7)) and stride in ((1, 1), (2, 2))
    return channels_last and square and dilation == _ONE and multiplier == 1


def refuses(
    kernel_backend: str,
    target: str,
    dtype: torch.dtype,
    direction: str = "forward",
    channels_last: bool = True,
    kernel: Pair = (3, 3),
    stride: Pair = _ONE,
    dilation: Pair = _ONE,
    multiplier: int = 1,
    segments: int = 1,
    channels: int = 0,
    pixels: int = 0,
) -> str | None:
    """Why a backend cannot compute a call, or None."""
    dtypes = {"cpp": _CPU_DTYPES, "cuda": _CUDA_DTYPES, "triton": _TRITON_DTYPES}.get(kernel_backend, (dtype,))
    if dtype not in dtypes:
        return f"computes {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, not {dtype}"
    if kernel_backend == "cuda" and segments > MAX_SEGMENTS:
        return f"takes at most {MAX_SEGMENTS} segments, not {segments}"
    if kernel_backend != "triton":
        return None
    if target == "cpu" and dtype == torch.bfloat16:
        return "is wrong in bfloat16 in Triton's interpreter"
    if not has_vectors(channels_last, kernel, stride, dilation, multiplier):
        return "computes channels_last, kernels of 3, 5 and 7, stride 1 and 2, no dilation, one filter per channel"
    return None


def _measured(
    direction: str,
    dtype: torch.dtype,
    channels_last: bool,
    kernel: Pair,
    stride: Pair,
    dilation: Pair,
    multiplier: int,
) -> backend.Choice:
    """Times of oneDNN (torch 2.13) / ours: MobileNetV2's layers and C = 8 to 200, one Sapphire Rapids core."""
    bf16, strided, large = dtype == torch.bfloat16, max(stride) > 1, max(kernel) > 3
    if has_vectors(channels_last, kernel, stride, dilation, multiplier):
        # forward: 1.0-1.7; input: float32 1.1-2.9, bfloat16 2-3.3 at stride 1 and 25-60 at stride 2
        # weight: float32 1.1-2.9, bfloat16 1.9-3.1, 5x5 and 7x7 7-80
        return _CPP
    if channels_last:
        # forward 0.2-0.9, weight 0.9-30, input 0.1-0.6, but bfloat16 with a stride or dilation 1.3-6
        slow_library = bf16 and (strided or dilation != _ONE)
        return _CPP if direction == "backward_weight" or (direction == "backward_input" and slow_library) else _LIBRARY
    # NCHW, forward: 0.3-1.1
    # input: 0.1-0.6, but bfloat16 at stride 2 2.3-15
    # weight: 0.2-1.6, 5x5 and 7x7 1.9-4.3
    if direction == "backward_input" and bf16 and strided:
        return _CPP
    return _CPP if direction == "backward_weight" and large else _LIBRARY
