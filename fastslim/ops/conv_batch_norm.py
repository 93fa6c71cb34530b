"""A convolution and the batch norm behind it as one step of autograd, for the CPU's host time.

The kernels and their arguments are those of `slim_conv2d`, `depthwise_conv2d` and `batch_norm_act`, so the numbers are
the same; what is saved is a second autograd function, and the checks that a pair of layers passes once. Calls that
need more than these kernels are refused, and take the two layers' own way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastslim.ops import backend
from fastslim.ops.apply_function import applier
from fastslim.ops.batch_norm_act import ACTIVATIONS, MASKED_BY_OUTPUT, dense_like
from fastslim.ops.once_differentiable import once_differentiable
from fastslim.ops.shared_gradient import SharedGradient
from fastslim.ops.slim_conv2d_choice import Chosen
from fastslim.ops.slim_conv2d_library import ConvShape
from fastslim.ops.step_buffers import GradientSlot, active_cast, active_slots, count_batch

Pair = tuple[int, int]
Settings = tuple[Pair, Pair, Pair, int]
_OPS = torch.ops.fastslim
_INDEX = {name: index for index, name in enumerate(ACTIVATIONS)}


class _Route(NamedTuple):
    """The kernels of a pair at an image size."""

    depthwise: bool
    size: Pair  # of the output
    forward: Callable[..., Tensor]
    backward_input: Callable[..., Tensor]
    backward_weight: Callable[..., None]
    settings: tuple[Pair, Pair, Pair]


class _Call(NamedTuple):
    route: _Route
    c_out: int
    slots: list[GradientSlot]  # of weight, scale and shift
    momentum: float
    eps: float
    activation: int
    of_input: SharedGradient | None
    of_residual: SharedGradient | None

    def conv(self) -> tuple[Any, ...]:
        """What the convolution's kernels take behind their tensors."""
        return (*self.route.settings, [], 1) if self.route.depthwise else (*self.route.settings, self.c_out, [])


def conv_batch_norm(
    x: Tensor,
    weight: Tensor,
    settings: Settings,
    c_out: int | None,
    scale: Tensor,
    shift: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    counter: Tensor | None,
    momentum: float,
    eps: float,
    activation: str,
    residual: Tensor | None,
    of_input: SharedGradient | None = None,
    of_residual: SharedGradient | None = None,
) -> Tensor | None:
    """``activation(bn(conv(x)) + residual)`` in training mode, of prefixes of the channels; None where it refuses.

    Args:
        x: input ``(N, c_in, H, W)``.
        weight: the full convolution's, which has no bias.
        settings: of the convolution: stride, padding, dilation and the full layer's groups.
        c_out: its active output channels; None for as many as a depthwise convolution's input has.
        scale: the full batch norm's weight.
        shift: its bias.
        running_mean: updated in place.
        running_var: updated in place.
        counter: of batches; one is added unless the call is refused.
        momentum: share of the batch in the running statistics.
        eps: added to the variance.
        activation: see :func:`batch_norm_act`.
        residual: added before the activation.
        of_input: where the gradient of `x` may lie already.
        of_residual: where the residual's goes.
    """
    size, dtype = x.shape, x.dtype
    # Channels_last beyond doubt, and more than one value a channel.
    if len(size) != 4 or size[0] < 2 or x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return None
    computes = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    if computes is not dtype or not (x.is_cpu and weight.is_cpu and scale.is_cpu and running_mean.is_cpu):
        return None
    full = weight.shape
    route = _route(
        dtype, weight.dtype, scale.dtype, running_mean.dtype, full, settings, size[2], size[3], backend.forced_backend()
    )
    if route is None or activation not in _INDEX:
        return None
    if c_out is None:
        c_out = size[1]
    widest = full[0] if route.depthwise else full[1]
    if size[1] > widest or not 0 < c_out <= full[0] or full[0] != scale.shape[0] or scale.shape != running_mean.shape:
        return None
    if route.depthwise and c_out != size[1]:
        return None
    if residual is not None and (residual.dtype is not dtype or residual.shape != (size[0], c_out, *route.size)):
        return None
    slots = active_slots(weight, scale, shift)
    if slots is None:
        return None
    if counter is not None:
        count_batch(counter)
    if of_input is not None:
        of_input.taken = x.requires_grad and not route.depthwise
    call = _Call(route, c_out, slots, momentum, eps, _INDEX[activation], of_input, of_residual)
    y: Tensor = _apply(x, weight, scale, shift, running_mean, running_var, residual, call)
    return y


@backend.remembered
def _route(
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    scale_dtype: torch.dtype,
    statistics_dtype: torch.dtype,
    full: torch.Size,
    settings: Settings,
    h: int,
    w: int,
    forced: str | None,
) -> _Route | None:
    """The C++ kernels, if they are the choice for everything."""
    stride, padding, dilation, groups = settings
    if dtype not in (torch.float32, torch.bfloat16) or len(full) != 4:
        return None
    if any(other != torch.float32 for other in (weight_dtype, scale_dtype, statistics_dtype)):
        return None
    depthwise = groups > 1 and full[1] == 1 and full[0] == groups
    if groups > 1 and not depthwise:
        return None
    shape = ConvShape(stride, padding, dilation, groups, full[0], None)
    out = shape.output_size((1, full[1], h, w), full)
    if min(out) < 1:
        return None
    kernel = (full[2], full[3])
    name = "depthwise_conv2d" if depthwise else "slim_conv2d"
    for direction in Chosen._fields:
        if depthwise:
            call: tuple[Any, ...] = direction, True, kernel, stride, dilation, 1, 1, full[0], h * w
        else:
            call = direction, True, kernel, stride, groups, (out[0] * out[1], full[1], full[0]), weight_dtype
        if backend.choose(name, "cpu", dtype, *call).backend != "cpp":
            return None
    if backend.choose("batch_norm_act", "cpu", dtype, True, out[0] * out[1], full[0], 1).backend != "cpp":
        return None
    if depthwise:
        ops = _below_autograd, _OPS.depthwise_conv2d_backward_input.default, _depthwise_weight
    else:
        ops = _OPS.slim_conv2d_cpp.default, _OPS.slim_conv2d_backward_input_cpp.default, _dense_weight
    return _Route(depthwise, out, *ops, (stride, padding, dilation))


def _below_autograd(*call: Any) -> Tensor:
    """The op's own autograd formula, for torch.compile, would only be looked up and left out again."""
    with torch._C._AutoDispatchBelowAutograd():
        y: Tensor = _OPS.depthwise_conv2d.default(*call)
    return y


def _dense_weight(grad: Tensor, x: Tensor, call: _Call, weight_shape: torch.Size) -> None:
    everything = x.shape[1] == weight_shape[1] and call.c_out == weight_shape[0]
    target, add = call.slots[0].target(everything)
    _OPS.slim_conv2d_backward_weight_cpp.default(grad, x, target, *call.route.settings, call.c_out, [], add)


def _depthwise_weight(grad: Tensor, x: Tensor, call: _Call, weight_shape: torch.Size) -> None:
    target, add = call.slots[0].target(x.shape[1] == weight_shape[0])
    _OPS.depthwise_conv2d_backward_weight.default(grad, x, target, None, *call.route.settings, [], 1, add, False)


class _ConvBatchNorm(torch.autograd.Function):
    """Keeps what the two layers' own functions keep: both inputs, C-sized statistics, y or the residual."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        residual: Tensor | None,
        call: _Call,
    ) -> Tensor:
        # Dense kernels read the parameter itself whatever they compute in, depthwise ones take x's type.
        weight = active_cast(weight, x.dtype) if call.route.depthwise else weight.detach()
        z = call.route.forward(x, weight, None, *call.conv())
        if residual is not None:
            residual = dense_like(residual, z)
        y, stats = _OPS.batch_norm_act.default(
            z, scale, shift, running_mean, running_var, residual, True, call.momentum, call.eps, call.activation,
            [],
        )  # fmt: skip
        extra = None
        if residual is not None and call.activation:
            extra = y if call.activation in MASKED_BY_OUTPUT else residual
        ctx.call = call
        ctx.save_for_backward(x, weight, z, extra, stats, scale, shift)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, z, extra, stats, scale, shift = ctx.saved_tensors
        call: _Call = ctx.call
        needs_x, *_, needs_residual, _ = ctx.needs_input_grad
        dy = dense_like(dy, z)
        everything = call.c_out == scale.shape[0]
        of_residual = needs_residual and extra is not None
        dz, dresidual = _OPS.batch_norm_act_backward_into.default(
            dy, z, extra, stats, scale, shift, True, call.activation, of_residual, [],
            *call.slots[1].target(everything), *call.slots[2].target(everything),
        )  # fmt: skip
        route = call.route
        shared = call.of_input
        gx = None if shared is None else shared.gradient
        if shared is not None and gx is not None:
            shared.gradient = None
            _OPS.slim_conv2d_backward_input_add_cpp.default(dz, weight, gx, *call.conv())
        elif needs_x:
            between = (x.shape, True) if route.depthwise else (x.shape,)
            gx = route.backward_input(dz, weight, *between, *call.conv())
        route.backward_weight(dz, x, call, weight.shape)
        dresidual = None if not needs_residual else dresidual if of_residual else dy
        if of_residual and call.of_residual is not None and call.of_residual.taken:
            call.of_residual.gradient, dresidual = dresidual, None
        return gx, None, None, None, None, None, dresidual, None


_apply = applier(_ConvBatchNorm)
