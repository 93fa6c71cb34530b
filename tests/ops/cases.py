"""Shapes and helpers that the tests of all ops and their benchmarks share."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def assert_as_exact_as_torch(ours: Tensor, torchs: Tensor, truth: Tensor) -> None:
    """`err(ours) <= 2 err(torch) + tiny`, both against float64: catches any wrong sum, spares rounding order."""
    assert ours.shape == truth.shape
    assert torch.isfinite(ours).all()
    scale = truth.abs().max().clamp_min(1e-30) if truth.numel() else torch.tensor(1.0)
    eps = torch.finfo(ours.dtype).eps
    error = (ours.double() - truth).abs().max() if truth.numel() else torch.tensor(0.0)
    allowed = 2 * (torchs.double() - truth).abs().max() + 4 * eps * scale if truth.numel() else torch.tensor(1.0)
    assert error <= allowed, f"error {error:.3e}, torch's own {(torchs.double() - truth).abs().max():.3e}"


def poison(parameter: Tensor, *active: slice) -> Tensor:
    """A copy with NaN everywhere but in the active region, which must be all that is ever read."""
    poisoned = torch.full_like(parameter, float("nan"))
    poisoned[active] = parameter[active]
    return poisoned
