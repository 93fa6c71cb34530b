"""A convolution and the batch norm behind it, called as one where that computes the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from fastslim.nn.batchnorm import SlimBatchNorm2d
from fastslim.nn.conv import SlimConv2d
from fastslim.ops.conv_batch_norm import Settings, conv_batch_norm

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def conv_batch_norm_of(conv: SlimConv2d, norm: SlimBatchNorm2d) -> Callable[..., Tensor]:
    """``norm(conv(x), residual, activation)``, in one step of autograd where nobody could tell the difference.

    Everything is looked at in every call: hooks, layers that follow mutables or are parametrized, modes and settings.
    """
    # The dicts themselves, and those of attributes: nn.Module's attribute machinery is most of a layer's host time.
    hooks = [getattr(layer, name) for layer in (conv, norm) for name in _HOOKS]
    of_conv, of_norm = vars(conv), vars(norm)

    def together(x: Tensor, residual: Tensor | None, activation: str) -> Tensor | None:
        if type(conv) is not SlimConv2d or type(norm) is not SlimBatchNorm2d:
            return None
        if "forward" in of_conv or "forward" in of_norm or not of_norm["training"]:
            return None
        segments = of_conv["segments"], of_conv["out_segments"], of_norm["segments"]
        if segments != (None, None, None) or of_conv["padding_mode"] != "zeros" or of_norm["momentum"] is None:
            return None
        weight, bias = of_conv["_parameters"].get("weight"), of_conv["_parameters"].get("bias")
        scale, shift = of_norm["_parameters"].get("weight"), of_norm["_parameters"].get("bias")
        mean, var = of_norm["_buffers"].get("running_mean"), of_norm["_buffers"].get("running_var")
        if weight is None or bias is not None or scale is None or shift is None or mean is None or var is None:
            return None
        settings = Settings(of_conv["stride"], of_conv["padding"], of_conv["dilation"], of_conv["groups"])
        c_out, groups = of_conv["active_out"], of_conv["groups"]
        if not of_norm["track_running_stats"] or isinstance(settings.padding, str):
            return None
        return conv_batch_norm(
            x,
            weight,
            settings,
            None if groups > 1 and c_out == of_conv["out_channels"] else c_out,
            scale,
            shift,
            mean,
            var,
            norm._average_factor,
            of_norm["eps"],
            activation,
            residual,
        )

    def conv_batch_norm_call(x: Tensor, residual: Tensor | None = None, activation: str = "none") -> Tensor:
        if not (any(hooks) or torch.compiler.is_compiling() or _has_any_global_hook()):
            y = together(x, residual, activation)
            if y is not None:
                return y
        y = norm(conv(x), residual, activation)
        return y

    return conv_batch_norm_call
