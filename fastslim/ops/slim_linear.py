"""Linear layer with `weight[:c_out, :c_in]`: matrix products on strided views, 1 to N leading dimensions.

y = x W[:c_out, active inputs]^T + b[:c_out]; inside a step the weight gradient goes straight into
the prefix of `param.grad` (addmm with beta = 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastslim import errors
from fastslim.ops import backend, slim_conv2d_cpp
from fastslim.ops.once_differentiable import once_differentiable
from fastslim.ops.segments import Segments, check_devices, check_segments, cut, flatten, pieces, unflatten, width_error
from fastslim.ops.slim_linear_triton import refusal
from fastslim.ops.step_buffers import GradientSlot, active_cast, active_slot, autocast_dtype
from fastslim.ops.weight_gradient import GradientSink, add_product

_LIB = torch.library.Library("fastslim", "FRAGMENT")
_LIB.define("slim_linear(Tensor x, Tensor weight, Tensor? bias, int c_out, int[] segments) -> Tensor")
_LIB.define(
    "slim_linear_backward(Tensor grad, Tensor x, Tensor weight, int c_out, int[] segments, bool[] needed)"
    " -> (Tensor, Tensor, Tensor)"
)


def slim_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, c_out: int, segments: Segments | None
) -> Tensor:
    """The definition: `F.linear` on the active slice of the weight."""
    w = cut(cut(weight, 0, None, c_out), 1, segments, x.shape[-1])
    return F.linear(x, w, None if bias is None else bias[:c_out])


_OPS = torch.ops.fastslim
_ESTIMATE = "dense products: cuBLAS is at the hardware's peak; Triton where a record says it is faster"


def _rule(
    target: str,
    dtype: torch.dtype,
    direction: str = "forward",
    sizes: tuple[int, int, int] = (0, 0, 0),
    weight_dtype: torch.dtype = torch.float32,
) -> backend.Choice:
    """`sizes`: rows, c_in, c_out."""
    if not backend.is_gpu(target):
        refused = _refuses("cpp", target, dtype, direction, sizes, weight_dtype)
        if refused is None and dtype == torch.bfloat16:
            return backend.Choice("cpp", slim_conv2d_cpp.AMX_REASON)
        return backend.Choice("library", "matrix products are at the hardware's peak in MKL and cuBLAS")
    refused = _refuses("triton", target, dtype, direction, sizes)
    return backend.gpu_choice(
        f"slim_linear.{direction}",
        target,
        dtype,
        kernels=("library",) if refused else ("library", "triton"),
        otherwise=backend.Choice("library", refused or _ESTIMATE),
        sizes=sizes,
    )


def _refuses(
    kernel: str,
    target: str,
    dtype: torch.dtype,
    direction: str = "forward",
    sizes: tuple[int, int, int] = (0, 0, 0),
    weight_dtype: torch.dtype = torch.float32,
) -> str | None:
    if kernel == "cpp":
        return slim_conv2d_cpp.refusal(dtype, weight_dtype)
    return refusal(target, dtype) if kernel == "triton" else None


backend.register("slim_linear", ("reference", "library", "cpp", "triton"), _rule, _refuses)


def _chosen(direction: str, x: Tensor, weight: Tensor, c_out: int) -> str:
    """Who computes one direction."""
    sizes = (x.shape[:-1].numel(), x.shape[-1], c_out)
    return backend.choose("slim_linear", backend.target_of(x), x.dtype, direction, sizes, weight.dtype).backend


def _images(matrix: Tensor) -> Tensor:
    """Rows as images of one pixel: to the C++ kernels a matrix product is a 1x1 convolution."""
    return matrix[:, :, None, None]


_POINTWISE = ((1, 1), (0, 0), (1, 1))  # stride, padding, dilation


def slim_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    c_out: int | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """Multiplies with the first `c_out` rows and the active input features of `weight`, in place.

    Args:
        x: input ``(*, c_in)``; `c_in` active features.
        weight: the full layer's weight ``(C_out, C_in)``.
        bias: the full layer's bias ``(C_out,)`` or None.
        c_out: active output features; all by default.
        segments: ``(start, count)`` input features of the full layer that `x` holds, in order, when
            they are not simply the first `c_in`.

    Returns:
        ``(*, c_out)``, equal to ``F.linear(x, weight[:c_out, :c_in], bias[:c_out])``.

    Raises:
        FastslimValueError: more features than the layer has, or an input that does not fit `segments`.
        FastslimTypeError: integer input.
    """
    _check_input(x, weight, bias)
    segments = check_segments("slim_linear", segments, x.shape[-1], weight.shape[1])
    if c_out is None:
        c_out = weight.shape[0]
    elif not 0 < c_out <= weight.shape[0]:
        raise width_error("slim_linear", c_out, weight.shape[0], "features")
    if backend.forced_backend() == "reference":
        return slim_linear_reference(x, weight, bias, c_out, segments)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
    if torch.compiler.is_compiling():
        if dtype is not None:
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return torch.ops.fastslim.slim_linear(x, weight, bias, c_out, flatten(segments))
    return _SlimLinear.apply(x, weight, bias, c_out, segments, active_slot(weight), active_slot(bias))


def _check_input(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() == 0:
        raise errors.FastslimValueError("slim_linear: the input is a scalar; it needs a feature dimension")
    if not x.dtype.is_floating_point:
        raise errors.FastslimTypeError(f"slim_linear: the input is {x.dtype}; convert it first: x.float()")
    check_devices("slim_linear", x, weight, bias)
    if x.dtype != weight.dtype and autocast_dtype(x) is None:
        raise errors.FastslimTypeError(
            f"slim_linear: input is {x.dtype}, weight is {weight.dtype}; convert one, or run under torch.autocast"
        )


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, c_out: int, segments: Segments | None, by: str) -> Tensor:
    if by == "cpp":
        rows = _images(x.reshape(-1, x.shape[-1]))
        y = _OPS.slim_conv2d_cpp(rows, _images(weight), bias, *_POINTWISE, c_out, flatten(segments))
        # Not a view to autograd, which would not let it be changed in place.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], c_out))
    if by == "triton":
        return _OPS.slim_linear_triton(x, weight, bias, c_out, flatten(segments))
    rows = x.reshape(-1, x.shape[-1])
    result = x.new_empty(*x.shape[:-1], c_out)  # returned itself: a view could not be changed in place
    y = result.view(rows.shape[0], c_out)
    b = None if bias is None else bias[:c_out]
    for start, offset, count in pieces(segments, x.shape[-1]):
        left, right = rows.narrow(1, offset, count), weight[:c_out].narrow(1, start, count).t()
        if offset:
            y.addmm_(left, right)
        elif b is not None:
            torch.addmm(b, left, right, out=y)
        else:
            torch.mm(left, right, out=y)
    return result


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, c_out: int, segments: Segments | None) -> Tensor:
    by = _chosen("backward_input", x, weight, c_out)
    if by == "cpp":
        size = x.shape[:-1].numel(), x.shape[-1], 1, 1
        images = _images(grad.reshape(-1, c_out)), _images(weight), size
        return _OPS.slim_conv2d_backward_input_cpp(*images, *_POINTWISE, c_out, flatten(segments)).view(x.shape)
    if by == "triton":
        return _OPS.slim_linear_backward_input_triton(grad, weight, x.shape[-1], flatten(segments), None, 0)
    rows, weight = grad.reshape(-1, c_out), weight.to(grad.dtype)  # the C++ kernel's forward keeps it as it is
    gx = rows.new_empty(rows.shape[0], x.shape[-1])
    for start, offset, count in pieces(segments, x.shape[-1]):
        torch.mm(rows, weight[:c_out].narrow(1, start, count), out=gx.narrow(1, offset, count))
    return gx.view(x.shape)


def _weight_sink(
    grad: Tensor, x: Tensor, weight: Tensor, c_out: int, segments: Segments | None, slot: GradientSlot | None = None
) -> GradientSink:
    """Computes the weight gradient; it is then where the sink says."""
    everything = c_out == weight.shape[0] and segments is None and x.shape[-1] == weight.shape[1]
    sink = GradientSink(weight, slot, everything)
    by = _chosen("backward_weight", x, weight, c_out)
    if by == "cpp":
        full, add = sink.target()
        images = _images(grad.reshape(-1, c_out)), _images(x.reshape(-1, x.shape[-1])), _images(full)
        _OPS.slim_conv2d_backward_weight_cpp(*images, *_POINTWISE, c_out, flatten(segments), add)
    elif by == "triton":
        full, add = sink.target()
        _OPS.slim_linear_backward_weight_triton(grad, x, full, flatten(segments), add, None, 0)
    else:
        add_product(sink, grad.reshape(-1, c_out), x.reshape(-1, x.shape[-1]), segments)
    return sink


class _SlimLinear(torch.autograd.Function):
    """The hot path: a hand-written backward that writes into gradient slots."""

    @staticmethod
    def forward(ctx, x, weight, bias, c_out, segments, weight_slot, bias_slot):
        # The C++ kernel reads the parameters themselves, whatever it computes in.
        by = _chosen("forward", x, weight, c_out)
        dtype = weight.dtype if by == "cpp" else x.dtype
        w, b = active_cast(weight, dtype), None if bias is None else active_cast(bias, dtype)
        ctx.save_for_backward(x, w)
        ctx.c_out, ctx.segments, ctx.slots = c_out, segments, (weight_slot, bias_slot)
        ctx.weight_like, ctx.bias_like = weight, bias
        return _forward(x, w, b, c_out, segments, by)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        c_out, segments, (weight_slot, bias_slot) = ctx.c_out, ctx.segments, ctx.slots
        gx = gw = gb = None
        if ctx.needs_input_grad[0]:
            gx = _input_gradient(grad, x, w, c_out, segments)
        if ctx.needs_input_grad[1]:
            gw = _weight_sink(grad, x, ctx.weight_like, c_out, segments, weight_slot).returned
        if ctx.needs_input_grad[2]:
            sink = GradientSink(ctx.bias_like, bias_slot, c_out == ctx.bias_like.shape[0])
            sink.add(grad.reshape(-1, c_out).sum(0), sink.full[:c_out])
            gb = sink.returned
        return gx, gw, gb, None, None, None, None


@torch.library.impl(_LIB, "slim_linear", "CompositeExplicitAutograd")
def _slim_linear_op(x, weight, bias, c_out, segments):
    return _forward(x, weight, bias, c_out, unflatten(segments), _chosen("forward", x, weight, c_out))


@torch.library.impl(_LIB, "slim_linear_backward", "CompositeExplicitAutograd")
def _slim_linear_backward_op(grad, x, weight, c_out, segments, needed):
    cuts, empty = unflatten(segments), grad.new_empty(0)
    gx = _input_gradient(grad, x, weight, c_out, cuts) if needed[0] else empty
    gw = _weight_sink(grad, x, weight, c_out, cuts).full if needed[1] else grad.new_empty(0)
    return gx, gw, grad.reshape(-1, c_out).sum(0) if needed[2] else grad.new_empty(0)


@torch.library.register_fake("fastslim::slim_linear", lib=_LIB)
def _slim_linear_fake(x, weight, bias, c_out, segments):
    return x.new_empty(*x.shape[:-1], c_out)


@torch.library.register_fake("fastslim::slim_linear_backward", lib=_LIB)
def _slim_linear_backward_fake(grad, x, weight, c_out, segments, needed):
    shapes = (x.shape, weight.shape, (c_out,))
    return tuple(grad.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needed, strict=True))


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.c_out, ctx.segments = inputs
    ctx.save_for_backward(x, weight)
    ctx.padding = None if bias is None else bias.shape[0] - ctx.c_out


def _op_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:3])
    gx, gw, gb = torch.ops.fastslim.slim_linear_backward(grad, x, weight, ctx.c_out, ctx.segments, needed)
    gb = F.pad(gb, (0, ctx.padding)) if needed[2] else None
    return gx if needed[0] else None, gw if needed[1] else None, gb, None, None


torch.library.register_autograd("fastslim::slim_linear", _op_backward, setup_context=_setup_context, lib=_LIB)
