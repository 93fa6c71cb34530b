"""Schema and fakes of batch_norm_act, forward and backward, which all its compiled backends share."""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD = (
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor? residual, bool training, float momentum, float eps, int activation, int[] segments) "
    "-> (Tensor y, Tensor stats)"
)
BACKWARD = (
    "(Tensor dy, Tensor x, Tensor? extra, Tensor stats, Tensor? weight, Tensor? bias, "
    "bool training, int activation, bool want_residual, bool want_parameters, int[] segments) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)

# On the CPU, where a step's gradients wait in memory: dweight and dbias go straight into full-size gradients.
BACKWARD_INTO = (
    "(Tensor dy, Tensor x, Tensor? extra, Tensor stats, Tensor? weight, Tensor? bias, bool training, "
    "int activation, bool want_residual, int[] segments, Tensor(a!)? grad_weight, bool add_weight, "
    "Tensor(b!)? grad_bias, bool add_bias) -> (Tensor dx, Tensor dresidual)"
)

# The op updates the running statistics in place, so it cannot carry an autograd formula of its own
# (torch.library.register_autograd takes functional ops only): `_Fused` in batch_norm_act.py differentiates it.
_LIBRARY = torch.library.Library("fastslim", "FRAGMENT")
_LIBRARY.define(f"batch_norm_act_backward_into{BACKWARD_INTO}")


def define(suffix: str) -> None:
    """Defines ``fastslim::batch_norm_act<suffix>`` and ``fastslim::batch_norm_act_backward<suffix>``."""
    for name, schema, fake in (("", FORWARD, _fake), ("_backward", BACKWARD, _fake_backward)):
        _LIBRARY.define(f"batch_norm_act{name}{suffix}{schema}")
        torch.library.register_fake(f"fastslim::batch_norm_act{name}{suffix}", fake)


def _fake(
    x, weight, bias, running_mean, running_var, residual, training, momentum, eps, activation, segments
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(2, x.shape[1], dtype=torch.float64)


def _fake_backward(
    dy, x, extra, stats, weight, bias, training, activation, want_residual, want_parameters, segments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vector = x.new_empty(x.shape[1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    dresidual = torch.empty_like(x) if want_residual else x.new_empty(0)
    return torch.empty_like(x), dresidual, vector, torch.empty_like(vector)


@torch.library.register_fake("fastslim::batch_norm_act_backward_into", lib=_LIBRARY)
def _fake_backward_into(dy, x, extra, stats, weight, bias, training, activation, want_residual, *gradients):
    return torch.empty_like(x), torch.empty_like(x) if want_residual else x.new_empty(0)
