"""What the loss ops refuse, and what they say then."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastslim import errors


def check_logits(teacher: Tensor, students: Sequence[Tensor], tau: float) -> None:
    """Refuses logits that do not belong together.

    Args:
        teacher: logits ``(N, C, ...)``.
        students: the others.
        tau: temperature.

    Raises:
        FastslimValueError: shapes or devices differ, or tau is not positive.
        FastslimTypeError: integer logits.
    """
    for name, logits in (("teacher", teacher), *((f"student {i}", student) for i, student in enumerate(students))):
        if not logits.is_floating_point():
            raise errors.FastslimTypeError(f"{name} logits are {logits.dtype}; give floating point logits")
        if logits.dim() < 2 or logits.shape[1] < 1:
            raise errors.FastslimValueError(f"{name} logits have shape {tuple(logits.shape)}; expected (N, C, ...)")
        if logits.shape != teacher.shape:
            raise errors.FastslimValueError(
                f"{name} logits have shape {tuple(logits.shape)}, the teacher's {tuple(teacher.shape)}: "
                "both must predict the same classes for the same batch"
            )
        if logits.device != teacher.device:
            raise errors.FastslimValueError(f"{name} logits are on {logits.device}, the teacher's on {teacher.device}")
    if not 0 < tau < math.inf:
        raise errors.FastslimValueError(
            f"tau={tau} must be a positive, finite temperature; 1.0 leaves logits as they are"
        )


def check_target(teacher: Tensor, target: Tensor, label_smoothing: float, class_weight: Tensor | None) -> None:
    """Refuses targets and options that do not fit the logits.

    Args:
        teacher: logits ``(N, C, ...)``.
        target: class indices ``(N, ...)`` or probabilities ``(N, C, ...)``.
        label_smoothing: in [0, 1].
        class_weight: ``(C,)``.

    Raises:
        FastslimValueError: a shape, device or number that does not fit.
        FastslimTypeError: targets that are neither indices nor probabilities.
    """
    if target.dtype == torch.bool or target.is_complex():
        raise errors.FastslimTypeError(
            f"target is {target.dtype}; give class indices (integers) or class probabilities"
        )
    positions = (teacher.shape[0], *teacher.shape[2:])
    expected = tuple(teacher.shape) if target.is_floating_point() else positions
    if tuple(target.shape) != expected:
        raise errors.FastslimValueError(
            f"target has shape {tuple(target.shape)}, expected {expected} for {target.dtype} targets and "
            f"logits of shape {tuple(teacher.shape)}"
        )
    if target.device != teacher.device:
        raise errors.FastslimValueError(f"target is on {target.device}, the logits are on {teacher.device}")
    if not 0 <= label_smoothing <= 1:
        raise errors.FastslimValueError(f"label_smoothing={label_smoothing} must lie in [0, 1]")
    if class_weight is not None and class_weight.shape != teacher.shape[1:2]:
        raise errors.FastslimValueError(
            f"class_weight has shape {tuple(class_weight.shape)}, expected ({teacher.shape[1]},): one weight per class"
        )
    if class_weight is not None and class_weight.device != teacher.device:
        raise errors.FastslimValueError(f"class_weight is on {class_weight.device}, the logits are on {teacher.device}")


def explain_target(target: Tensor | None, classes: int, ignore_index: int) -> None:
    """Names the first target that is no class; looked for only after the kernel refused one.

    Raises:
        FastslimValueError: there is such a target.
    """
    if target is None:
        return
    wrong = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
    if wrong.numel():
        raise errors.FastslimValueError(
            f"target {int(wrong[0])} is not a class: targets are in [0, {classes}) or ignore_index ({ignore_index}); "
            f"{wrong.numel()} of {target.numel()} are outside, check the labels or the model's number of classes"
        ) from None
