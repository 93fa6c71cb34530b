"""`slim_conv2d` by the C++ kernels as opaque ops: channels_last on the CPU, float32 weight read in place."""

from __future__ import annotations

import torch

from fastslim import _ext
from fastslim.ops.segments import unflatten
from fastslim.ops.slim_conv2d_library import ConvShape

AMX_REASON = "AMX, and no code is generated for new widths as in oneDNN"

_LIB = torch.library.Library("fastslim", "FRAGMENT")
_CONV = "int[] stride, int[] padding, int[] dilation, int c_out, int[] segments"
_LIB.define(f"slim_conv2d_cpp(Tensor x, Tensor weight, Tensor? bias, {_CONV}) -> Tensor")
_LIB.define(f"slim_conv2d_backward_input_cpp(Tensor grad, Tensor weight, int[] x_size, {_CONV}) -> Tensor")
_LIB.define(f"slim_conv2d_backward_input_add_cpp(Tensor grad, Tensor weight, Tensor(a!) grad_x, {_CONV}) -> ()")
_LIB.define(f"slim_conv2d_backward_weight_cpp(Tensor grad, Tensor x, Tensor(a!) grad_weight, {_CONV}, bool add) -> ()")


@torch.library.register_fake("fastslim::slim_conv2d_cpp", lib=_LIB)
def _forward_fake(x, weight, bias, stride, padding, dilation, c_out, segments):
    shape = ConvShape(tuple(stride), tuple(padding), tuple(dilation), 1, c_out, unflatten(segments))
    size = (x.shape[0], c_out, *shape.output_size(x.shape, weight.shape))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("fastslim::slim_conv2d_backward_input_cpp", lib=_LIB)
def _backward_input_fake(grad, weight, x_size, stride, padding, dilation, c_out, segments):
    return torch.empty(x_size, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)


@torch.library.register_fake("fastslim::slim_conv2d_backward_input_add_cpp", lib=_LIB)
def _backward_input_add_fake(grad, weight, grad_x, stride, padding, dilation, c_out, segments):
    return None


@torch.library.register_fake("fastslim::slim_conv2d_backward_weight_cpp", lib=_LIB)
def _backward_weight_fake(grad, x, grad_weight, stride, padding, dilation, c_out, segments, add):
    return None


def refusal(dtype: torch.dtype, weight_dtype: torch.dtype) -> str | None:
    """Why the C++ kernels cannot compute in `dtype` with weights of `weight_dtype`, or None."""
    if weight_dtype != torch.float32 or dtype not in (torch.float32, torch.bfloat16):
        return (
            f"the C++ kernel computes in float32 or bfloat16 with float32 weights, not in {dtype} with {weight_dtype}"
        )
    if dtype == torch.bfloat16 and not _ext.BUILD["slim_conv2d_bf16"]:
        return "the C++ kernel needs AMX for bfloat16"
    return None
