"""Who computes a direction of `slim_conv2d`, and why."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastslim import _ext
from fastslim.ops import backend, slim_conv2d_cpp
from fastslim.ops.slim_conv2d_library import ConvShape, memory_format
from fastslim.ops.slim_linear_triton import refusal

_ESTIMATE = "dense products: cuDNN and cuBLAS are at the hardware's peak; Triton where a record says it is faster"


def _rule(
    target: str,
    dtype: torch.dtype,
    direction: str = "forward",
    channels_last: bool = True,
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    groups: int = 1,
    sizes: tuple[int, int, int] = (0, 0, 0),
    weight_dtype: torch.dtype = torch.float32,
) -> backend.Choice:
    """`sizes`: pixels of the output, c_in, c_out."""
    call = dtype, direction, channels_last, kernel, stride, groups, sizes, weight_dtype
    if not backend.is_gpu(target):
        refused = _refuses("cpp", target, *call)
        return backend.Choice("library", refused) if refused else _on_cpu(dtype, kernel, stride)
    refused = _refuses("triton", target, *call)
    return backend.gpu_choice(
        f"slim_conv2d.{direction}",
        target,
        dtype,
        kernels=("library",) if refused else ("library", "triton"),
        otherwise=backend.Choice("library", refused or _ESTIMATE),
        exact=(f"{kernel[0]}x{kernel[1]}", f"s{stride[0]}"),
        sizes=sizes,
    )


def _refuses(
    kernel: str,
    target: str,
    dtype: torch.dtype,
    direction: str = "forward",
    channels_last: bool = True,
    size: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    groups: int = 1,
    sizes: tuple[int, int, int] = (0, 0, 0),
    weight_dtype: torch.dtype = torch.float32,
) -> str | None:
    if kernel not in ("cpp", "triton"):
        return None
    if groups > 1:
        return "our kernels of dense convolutions have no groups"
    if not channels_last:
        return "our kernels compute channels_last: model.to(memory_format=torch.channels_last)"
    if kernel == "triton":
        return refusal(target, dtype)
    return slim_conv2d_cpp.refusal(dtype, weight_dtype)


def _on_cpu(dtype: torch.dtype, kernel: tuple[int, int], stride: tuple[int, int]) -> backend.Choice:
    """The faster one of those that can compute a call on the CPU."""
    if dtype == torch.bfloat16:
        return backend.Choice("cpp", slim_conv2d_cpp.AMX_REASON)
    if kernel == stride == (1, 1):
        reason = "matrix products on strided views, straight by the BLAS that torch brings"
        return backend.Choice("cpp" if _ext.BUILD["blas"] else "library", reason)
    if _ext.BUILD["cpu_isa"] not in ("avx512", "avx512_bf16"):
        return backend.Choice("library", "the C++ kernel was tuned for AVX-512 only")
    return backend.Choice("cpp", "as fast as oneDNN's code, which is generated anew for every new width")


backend.register("slim_conv2d", ("reference", "library", "cpp", "triton"), _rule, _refuses)


KERNELS = ("cpp", "triton")  # ours; everything else goes through the library


class Chosen(NamedTuple):
    """The backend of every direction."""

    forward: str
    backward_input: str
    backward_weight: str


def chosen(x: Tensor, weight: Tensor, shape: ConvShape) -> Chosen:
    """Who computes a call; `weight` has the kernel's size."""
    channels_last, forced = memory_format(x) is torch.channels_last, backend.forced_backend()
    return _chosen(backend.target_of(x), x.dtype, x.shape, channels_last, weight.shape[2:], shape, weight.dtype, forced)


@backend.remembered
def _chosen(
    target: str,
    dtype: torch.dtype,
    size: torch.Size,
    channels_last: bool,
    kernel: torch.Size,
    shape: ConvShape,
    weight_dtype: torch.dtype,
    forced: str | None,
) -> Chosen:
    """One look-up a call, since a GPU's host makes hundreds in a pass."""
    h, w = shape.output_size(size, kernel)
    sizes = size[0] * h * w, size[1], shape.c_out
    call = channels_last, tuple(kernel), shape.stride, shape.groups, sizes, weight_dtype
    return Chosen(*(backend.choose("slim_conv2d", target, dtype, way, *call).backend for way in Chosen._fields))
