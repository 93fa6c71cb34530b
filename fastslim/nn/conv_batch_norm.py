"""A convolution and the batch norm behind it, called as one where that computes the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from fastslim.nn.batchnorm import SlimBatchNorm2d
from fastslim.nn.conv import SlimConv2d
from fastslim.ops.conv_batch_norm import conv_batch_norm
from fastslim.ops.shared_gradient import SharedGradient

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def conv_batch_norm_of(conv: SlimConv2d, norm: SlimBatchNorm2d) -> Callable[..., Tensor]:
    """``norm(conv(x), residual, activation)``, in one step of autograd where nobody could tell the difference.

    Everything is looked at in every call: hooks, layers that follow mutables or are parametrized, modes and settings.
    """
    # The dicts themselves, and those of attributes: nn.Module's attribute machinery is most of a layer's host time.
    hooks = [getattr(layer, name) for layer in (conv, norm) for name in _HOOKS]
    of_conv, of_norm = vars(conv), vars(norm)

    def together(
        x: Tensor,
        residual: Tensor | None,
        activation: str,
        of_input: SharedGradient | None,
        of_residual: SharedGradient | None,
    ) -> Tensor | None:
        if type(conv) is not SlimConv2d or type(norm) is not SlimBatchNorm2d:
            return None
        if "forward" in of_conv or "forward" in of_norm or not (of_norm["training"] and of_norm["track_running_stats"]):
            return None
        if not (of_conv["segments"] is of_conv["out_segments"] is of_norm["segments"] is None):
            return None
        weights, affine, buffers = of_conv["_parameters"], of_norm["_parameters"], of_norm["_buffers"]
        weight, scale, shift = weights.get("weight"), affine.get("weight"), affine.get("bias")
        mean, var, momentum = buffers.get("running_mean"), buffers.get("running_var"), of_norm["momentum"]
        if weight is None or scale is None or shift is None or mean is None or var is None or momentum is None:
            return None
        padding, groups, c_out = of_conv["padding"], of_conv["groups"], of_conv["active_out"]
        if weights.get("bias") is not None or of_conv["padding_mode"] != "zeros" or type(padding) is not tuple:
            return None
        return conv_batch_norm(
            x,
            weight,
            (of_conv["stride"], padding, of_conv["dilation"], groups),
            None if groups > 1 and c_out == of_conv["out_channels"] else c_out,
            scale,
            shift,
            mean,
            var,
            buffers.get("num_batches_tracked"),
            momentum,
            of_norm["eps"],
            activation,
            residual,
            of_input,
            of_residual,
        )

    def conv_batch_norm_call(
        x: Tensor,
        residual: Tensor | None = None,
        activation: str = "none",
        of_input: SharedGradient | None = None,
        of_residual: SharedGradient | None = None,
        between: SharedGradient | None = None,
    ) -> Tensor:
        if not (any(hooks) or torch.compiler.is_compiling() or _has_any_global_hook()):
            y = together(x, residual, activation, of_input, of_residual)
            if y is not None:
                return y
        if between is not None:
            between.taken = False  # what a hook gives out need not lead back to where the block begins
        return norm(conv(x), residual, activation)

    return conv_batch_norm_call
