"""Depthwise convolution of the active channels of a slimmable layer, its weight read in place.

Forward, input and weight gradient each go to the faster of our CPU kernels and the library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastslim import _ext
from fastslim.ops import backend
from fastslim.ops.depthwise_conv2d_library import (
    DepthwiseShape,
    Pair,
    check_arguments,
    depthwise_conv2d_reference,
    library_backward,
    library_forward,
    memory_format,
)
from fastslim.ops.segments import Segments, pieces
from fastslim.ops.step_buffers import GradientSlot, active_cast, active_slot, autocast_dtype

_LIB = torch.library.Library("fastslim", "FRAGMENT")
_CONV = "int[2] stride, int[2] padding, int[2] dilation, int[] segments, int multiplier"
_LIB.define(f"depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, {_CONV}) -> Tensor")
_LIB.define(
    "depthwise_conv2d_backward_input("
    f"Tensor grad_output, Tensor weight, int[] input_size, bool channels_last, {_CONV}) -> Tensor"
)
_LIB.define(
    "depthwise_conv2d_backward_weight(Tensor grad_output, Tensor x, Tensor(a!) grad_weight, Tensor(b!)? grad_bias, "
    f"{_CONV}, bool add_weight, bool add_bias) -> ()"
)
_OPS = torch.ops.fastslim
_CPP = backend.Choice("cpp", "our kernel is as fast or faster (measured)")
_LIBRARY = backend.Choice("library", "oneDNN is faster here (measured)")


def _rule(
    target: str,
    dtype: torch.dtype,
    direction: str = "forward",
    channels_last: bool = True,
    kernel: Pair = (3, 3),
    stride: Pair = (1, 1),
    dilation: Pair = (1, 1),
    multiplier: int = 1,
) -> backend.Choice:
    if backend.is_gpu(target) and _ext.CUDA_UNUSABLE is None:
        return backend.Choice(
            "library", "our CUDA kernels have not been measured yet; FASTSLIM_BACKEND=cuda takes them"
        )
    if target != "cpu":
        return backend.Choice("library", f"no kernel of ours for {target}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return backend.Choice("library", f"our kernels compute float32, bfloat16 and float64, not {dtype}")
    return _measured(direction, dtype, channels_last, kernel, stride)


def _measured(direction: str, dtype: torch.dtype, channels_last: bool, kernel: Pair, stride: Pair) -> backend.Choice:
    """Times of oneDNN (torch 2.13) / ours: MobileNetV2's layers and C = 8 to 200, one Sapphire Rapids core."""
    bf16, strided, large = dtype == torch.bfloat16, max(stride) > 1, max(kernel) > 3
    if channels_last:
        # float32 0.8-1.7, 5x5 0.95, 7x7 0.85; bfloat16 0.6-0.95 (it has instructions for bf16 pairs), C = 40 1.2
        if direction == "forward":
            return _LIBRARY if bf16 else _CPP
        # input: float32 1.0-2.5, bfloat16 1.1-1.4 at stride 1 and 25-60 at stride 2
        # weight: float32 0.8-2.3, bfloat16 0.85-1.9, 5x5 and 7x7 8-50
        return _CPP
    # NCHW, forward: 0.3-1.1
    # input: 0.1-0.6, but bfloat16 at stride 2 2.3-15
    # weight: 0.2-1.6, 5x5 and 7x7 1.9-4.3
    if direction == "backward_input" and bf16 and strided:
        return _CPP
    return _CPP if direction == "backward_weight" and large else _LIBRARY


_CUDA = ("cuda",) if _ext.CUDA_UNUSABLE is None else ()
backend.register("depthwise_conv2d", ("reference", "library", "cpp", *_CUDA), _rule)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    segments: Segments | None = None,
    multiplier: int = 1,
) -> Tensor:
    """Convolves every active channel with its own `multiplier` filters of the full layer's weight.

    Args:
        x: input ``(N, C, H, W)``, NCHW or channels_last; `C` active channels.
        weight: the full layer's weight ``(C_full * multiplier, 1, kh, kw)``, any strides.
        bias: the full layer's bias ``(C_full * multiplier,)`` or None.
        stride: as in :func:`torch.nn.functional.conv2d`.
        padding: zeros added on both sides, per spatial dimension.
        dilation: spacing between filter taps.
        segments: ``(start, count)`` channel ranges of the full layer that are the input's channels, in
            order; None for the first `C`.
        multiplier: filters per channel.

    Returns:
        ``(N, C * multiplier, H_out, W_out)`` in the memory format of `x`, equal to
        ``F.conv2d(x, weight[:C * multiplier], bias[:C * multiplier], ..., groups=C)``.

    Raises:
        FastslimValueError: more channels than the layer has, segments that do not fit the input, or a
            kernel larger than the padded input.
        FastslimTypeError: integer input, or a dtype other than the weight's outside autocast.
    """
    conv = check_arguments(x, weight, bias, stride, padding, dilation, segments, multiplier)
    if _chosen("forward", x, weight, conv) == "reference":
        return depthwise_conv2d_reference(x, weight, bias, conv)
    if (dtype := autocast_dtype(x)) is not None:
        x = x.to(dtype)
    if torch.compiler.is_compiling():
        w, b = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return _OPS.depthwise_conv2d(_dense(x), w, b, *conv)
    return _DepthwiseConv2d.apply(x, weight, bias, conv, active_slot(weight), active_slot(bias))


def _chosen(direction: str, x: Tensor, weight: Tensor, conv: DepthwiseShape) -> str:
    """The backend of one direction."""
    kernel = (weight.shape[2], weight.shape[3])
    return backend.choose(
        "depthwise_conv2d",
        backend.target_of(x),
        x.dtype,
        direction,
        memory_format(x) is torch.channels_last,
        kernel,
        conv.stride,
        conv.dilation,
        conv.multiplier,
    ).backend


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=memory_format(x))


class _DepthwiseConv2d(torch.autograd.Function):
    """The hot path: a hand-written backward that writes into gradient slots."""

    @staticmethod
    def forward(ctx, x, weight, bias, conv, weight_slot, bias_slot):
        x, w = _dense(x), active_cast(weight, x.dtype)
        b = None if bias is None else active_cast(bias, x.dtype)
        ctx.save_for_backward(x, w)
        ctx.conv, ctx.slots, ctx.parameters = conv, (weight_slot, bias_slot), (weight, bias)
        if _chosen("forward", x, w, conv) == "library":
            return library_forward(x, w, b, conv)
        return _OPS.depthwise_conv2d(x, w, b, *conv)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x, w), conv = ctx.saved_tensors, ctx.conv
        (weight, bias), (weight_slot, bias_slot) = ctx.parameters, ctx.slots
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad = grad.contiguous(memory_format=memory_format(x))
        library_x = needs_x and _chosen("backward_input", x, w, conv) == "library"
        library_weight = needs_weight and _chosen("backward_weight", x, w, conv) == "library"
        gx = dw = gw = gb = None
        if library_x or library_weight:
            gx, dw = library_backward(grad, x, w, conv, (library_x, library_weight))
        if needs_x and gx is None:
            channels_last = memory_format(x) is torch.channels_last
            gx = _OPS.depthwise_conv2d_backward_input(grad, w, x.shape, channels_last, *conv)
        if needs_weight and dw is None:
            with_bias = bias if needs_bias else None
            gw, gb = _kernel_backward_weight(grad, x, weight, with_bias, weight_slot, bias_slot, conv)
        elif dw is not None:
            gw = _put_rows(weight, weight_slot, dw, conv.rows)
        if needs_bias and (dw is not None or not needs_weight):
            gb = _put_rows(bias, bias_slot, grad.sum((0, 2, 3)), conv.rows)
        return gx, gw, gb, None, None, None


def _kernel_backward_weight(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_slot: GradientSlot | None,
    bias_slot: GradientSlot | None,
    conv: DepthwiseShape,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias; None for what went into a slot, or was not asked for."""
    everything = x.shape[1] * conv.multiplier == weight.shape[0]
    gw, add_weight = _target(weight, weight_slot, everything)
    gb, add_bias = (None, False) if bias is None else _target(bias, bias_slot, everything)
    _OPS.depthwise_conv2d_backward_weight(grad, x, gw, gb, *conv, add_weight, add_bias)
    return (
        _deliver(weight, weight_slot, gw),
        None if bias is None or gb is None else _deliver(bias, bias_slot, gb),
    )


def _target(parameter: Tensor, slot: GradientSlot | None, everything: bool) -> tuple[Tensor, bool]:
    """Where the kernel writes (the slot itself if it has the kernel's dtype), and whether it adds."""
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    if slot is not None and slot.view.dtype == dtype:
        return slot.target(everything)
    make = torch.empty_like if everything else torch.zeros_like
    return make(parameter, dtype=dtype), False


def _deliver(parameter: Tensor, slot: GradientSlot | None, gradient: Tensor) -> Tensor | None:
    """A full-size gradient, handed to the slot unless it is the slot, or returned in the parameter's dtype."""
    if slot is None:
        return gradient.to(parameter.dtype)
    if gradient is not slot.view:
        slot.add(gradient, slot.view, region_full=True)
    return None


def _put_rows(parameter: Tensor, slot: GradientSlot | None, value: Tensor, rows: Segments | None) -> Tensor | None:
    """Puts the gradient of the active rows into the slot, or into a full-size gradient."""
    everything = value.shape[0] == parameter.shape[0]
    if slot is not None:
        full, add = slot.target(everything)
    else:
        full, add = (torch.empty_like if everything else torch.zeros_like)(parameter), False
    for start, offset, count in pieces(rows, value.shape[0]):
        region, part = full.narrow(0, start, count), value.narrow(0, offset, count)
        region.add_(part) if add else region.copy_(part)
    return None if slot is not None else full


@torch.library.register_fake("fastslim::depthwise_conv2d", lib=_LIB)
def _fake(x, weight, bias, stride, padding, dilation, segments, multiplier):
    size = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    return torch.empty(
        (x.shape[0], x.shape[1] * multiplier, *size), dtype=x.dtype, device=x.device, memory_format=memory_format(x)
    )


@torch.library.register_fake("fastslim::depthwise_conv2d_backward_input", lib=_LIB)
def _fake_backward_input(grad_output, weight, input_size, channels_last, *conv):
    dense = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(input_size), dtype=grad_output.dtype, device=grad_output.device, memory_format=dense)


@torch.library.register_fake("fastslim::depthwise_conv2d_backward_weight", lib=_LIB)
def _fake_backward_weight(*arguments):
    return None


def _setup_context(ctx, inputs, output):
    x, weight, bias, *conv = inputs
    ctx.save_for_backward(x, weight)
    ctx.conv, ctx.bias_like = conv, bias


def _op_backward(ctx, grad):
    (x, weight), conv, bias = ctx.saved_tensors, ctx.conv, ctx.bias_like
    dense = memory_format(x)
    grad = grad.contiguous(memory_format=dense)
    gx = gw = gb = None
    if ctx.needs_input_grad[0]:
        gx = _OPS.depthwise_conv2d_backward_input(grad, weight, x.shape, dense is torch.channels_last, *conv)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        gw = torch.zeros_like(weight, dtype=dtype)
        gb = torch.zeros_like(bias, dtype=dtype) if ctx.needs_input_grad[2] else None
        _OPS.depthwise_conv2d_backward_weight(grad, x, gw, gb, *conv, False, False)
        gw, gb = gw.to(weight.dtype), None if gb is None else gb.to(weight.dtype)
    return gx, gw, gb, *[None] * 5


torch.library.register_autograd("fastslim::depthwise_conv2d", _op_backward, setup_context=_setup_context, lib=_LIB)
