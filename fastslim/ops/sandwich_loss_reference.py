"""The definition of sandwich_loss and kl_div_loss, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What losses of logits of this dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sandwich_loss_reference(
    teacher: Tensor,
    students: Sequence[Tensor],
    target: Tensor,
    *,
    tau: float = 1.0,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """:func:`fastslim.ops.sandwich_loss` in plain torch."""
    dtype = accumulate_dtype(teacher.dtype)
    logits = teacher.to(dtype)
    weight = None if class_weight is None else class_weight.to(dtype)
    labels = target.to(dtype) if target.is_floating_point() else target.long()
    losses = [F.cross_entropy(logits, labels, weight, ignore_index=ignore_index, label_smoothing=label_smoothing)]
    losses += [kl_div_loss_reference(student, teacher.detach(), tau=tau) for student in students]
    return torch.stack(losses)


def kl_div_loss_reference(
    student: Tensor, teacher: Tensor, *, tau: float = 1.0, reduction: str = "batchmean"
) -> Tensor:
    """:func:`fastslim.ops.kl_div_loss` in plain torch."""
    dtype = accumulate_dtype(student.dtype)
    log_q = F.log_softmax(student.to(dtype) / tau, dim=1)
    p = F.softmax(teacher.to(dtype) / tau, dim=1)
    # 0 log 0 = 0, also where the student's logit is -inf too (F.kl_div alone gives NaN there).
    terms = tau * tau * F.kl_div(log_q, p, reduction="none").masked_fill(p == 0, 0)
    if reduction == "batchmean":
        return terms.sum() / student.shape[0] if student.shape[0] else terms.sum() * math.nan
    if reduction == "none":
        return terms
    return terms.sum() if reduction == "sum" else terms.mean()
