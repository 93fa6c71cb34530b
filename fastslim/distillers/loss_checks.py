"""What the distillation losses check of their arguments, and how they reduce."""

from __future__ import annotations

import torch
from torch import Tensor

from fastslim import errors
from fastslim.contract_errors import AssertedValueError

REDUCTIONS = ("none", "batchmean", "sum", "mean")


def check_one_of(name: str, value: object, known: tuple[str | None, ...]) -> None:
    """Refuses a value that is not among the known ones."""
    if value not in known:
        allowed = " or ".join(f'"{one}"' for one in known)
        raise AssertedValueError(
            f'"{name}" must be {allowed}, but got {value!r}: {errors.nearest(str(value), map(str, known))}'
        )


def check_same_shape(student: Tensor, teacher: Tensor) -> None:
    """Refuses a student's and a teacher's feature of different shapes."""
    if student.shape != teacher.shape:
        raise AssertedValueError(
            f"the student's feature has shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: "
            "a connector can bring them together"
        )


def check_logits(student: Tensor, teacher: Tensor) -> None:
    """Refuses logits that are not ``(N, C)`` of one shape."""
    if student.dim() != 2 or student.shape != teacher.shape:
        raise AssertedValueError(
            "the logits of the student and the teacher should be (N, C) of one shape, but got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )


def check_labels(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels ``(N,)`` of logits ``(N, C)``."""
    if labels.is_floating_point() or labels.numel() != logits.shape[0]:
        raise AssertedValueError(
            f"gt_labels should be {logits.shape[0]} class numbers, one for each sample, but got {labels.dtype} of "
            f"shape {tuple(labels.shape)}"
        )
    return labels.reshape(-1).long()


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision is too coarse for sums over a batch."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def reduced(loss: Tensor, reduction: str) -> Tensor:
    """A loss per element, reduced; ``"batchmean"`` divides the sum by the number of samples."""
    if reduction == "none":
        return loss
    if reduction == "mean":
        return loss.mean()
    return loss.sum() / (loss.shape[0] if reduction == "batchmean" else 1)
