"""The losses of a sandwich step: cross-entropy of the max subnet and tau^2 KL of its students, with their gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastslim import errors
from fastslim.ops import backend
from fastslim.ops.sandwich_loss_checks import check_logits, check_target, explain_target

REDUCTIONS = ("batchmean", "sum", "mean", "none")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float64)

_LIBRARY = torch.library.Library("fastslim", "FRAGMENT")
# losses (1 + students,) in the accumulation dtype; grads (teacher_grad + students * student_grad, rows, classes).
_LIBRARY.define(
    "sandwich_loss(Tensor teacher, Tensor[] students, Tensor? target, Tensor? class_weight, float tau, "
    "float label_smoothing, int ignore_index, float kl_scale, bool teacher_grad, bool student_grad) "
    "-> (Tensor losses, Tensor grads)"
)


def _rule(target: str, dtype: torch.dtype, soft: bool) -> backend.Choice:
    if soft:
        return backend.Choice("reference", "class probabilities as target, reduction 'none' and a teacher that learns")
    if dtype not in _KERNEL_DTYPES:
        return backend.Choice("reference", f"the kernel computes float32, bfloat16 and float64, not {dtype}")
    if target != "cpu":
        return backend.Choice("reference", f"no kernel for {target} yet")
    return backend.Choice("cpp", "loss and gradient from one read of the logits")


backend.register("sandwich_loss", ("reference", "cpp"), _rule)


def _computed_plainly(logits: Tensor, soft: bool) -> bool:
    if soft or logits.dtype not in _KERNEL_DTYPES:  # forcing a backend does not give it what it lacks
        return True
    return backend.choose("sandwich_loss", backend.target_of(logits), logits.dtype, soft).backend == "reference"


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("fastslim::sandwich_loss")
def _fake(
    teacher, students, target, class_weight, tau, label_smoothing, ignore_index, kl_scale, teacher_grad, student_grad
):
    torch._check(teacher.dim() == 2, lambda: "logits are (rows, classes)")
    count = int(teacher_grad and target is not None) + (len(students) if student_grad else 0)
    losses = teacher.new_empty(1 + len(students), dtype=_accumulate_dtype(teacher.dtype))
    return losses, teacher.new_empty(count, *teacher.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.num_students, ctx.student_grad = len(inputs[1]), inputs[9]
    ctx.teacher_grad = inputs[8] and inputs[2] is not None
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad_losses: Tensor, _: Tensor) -> tuple[Any, ...]:
    (grads,) = ctx.saved_tensors
    scale = grad_losses.to(grads.dtype)
    first = int(ctx.teacher_grad)
    teacher = grads[0] * scale[0] if ctx.teacher_grad else None
    if ctx.student_grad:
        students = [grads[first + i] * scale[1 + i] for i in range(ctx.num_students)]
    else:
        students = [None] * ctx.num_students
    return teacher, students, *[None] * 8


torch.library.register_autograd("fastslim::sandwich_loss", _backward, setup_context=_setup_context)


class _Fused(torch.autograd.Function):
    """The kernel's gradient goes out at the first backward; a later one (retain_graph) computes it again."""

    @staticmethod
    def forward(
        ctx: Any, target: Tensor | None, options: tuple[Any, ...], teacher: Tensor, *students: Tensor
    ) -> Tensor:
        needs = ctx.needs_input_grad[2:]
        ctx.options = (*options, needs[0] and target is not None, any(needs[1:]))
        ctx.save_for_backward(target, teacher, *students)
        # Past the registered autograd, which would cost as much as the rest of the call.
        with torch._C._AutoDispatchBelowAutograd():
            losses, ctx.grads = _call(teacher, students, target, ctx.options)
        return losses if target is not None else losses[1].clone()  # a view could not be changed in place

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise errors.FastslimRuntimeError(
                "sandwich_loss and kl_div_loss have first derivatives only, and create_graph=True asks for more: "
                'compute the loss inside `with fastslim.ops.use_backend("reference")`'
            )
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            target, teacher, *students = ctx.saved_tensors
            grads = _call(teacher, students, target, ctx.options)[1]
        teacher_grad, student_grad = ctx.options[-2:]
        scales = grad_losses.tolist() if grad_losses.dim() else (0.0, grad_losses.item())
        remaining = iter(grads.unbind(0))
        result: list[Tensor | None] = []
        for index, (scale, needed) in enumerate(zip(scales, ctx.needs_input_grad[2:], strict=True)):
            grad = next(remaining) if (student_grad if index else teacher_grad) else None
            result.append(grad if scale == 1.0 or grad is None else grad.mul_(scale) if needed else None)
        return None, None, *result


def _call(
    teacher: Tensor, students: Sequence[Tensor], target: Tensor | None, options: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Runs the op on (rows, classes) views; the gradients (count, N, C, d1, ...) come in the logits' layout."""
    class_weight, tau, label_smoothing, ignore_index, *rest = options
    shape = teacher.shape
    rows = [_rows(logits) for logits in (teacher, *students)]
    labels = None if target is None else target.reshape(-1).contiguous()
    try:
        losses, grads = torch.ops.fastslim.sandwich_loss(
            rows[0], rows[1:], labels, class_weight, tau, label_smoothing, ignore_index, *rest
        )
    except RuntimeError as error:
        explain_target(target, shape[1], ignore_index)
        raise error
    if len(shape) > 2:
        grads = grads.view(-1, shape[0], *shape[2:], shape[1]).movedim(-1, 2)
    return losses, grads


def _run(
    teacher: Tensor, students: Sequence[Tensor], target: Tensor | None, class_weight: Tensor | None, *numbers: Any
) -> Tensor:
    """The losses ``(1 + students,)``; without a target the one student's KL alone."""
    options = (class_weight, *numbers)
    needs = teacher.requires_grad, any(student.requires_grad for student in students)
    learns = torch.is_grad_enabled() and any(needs)
    if learns and not torch.compiler.is_compiling():
        return _Fused.apply(target, options, teacher, *students)
    # torch.compile traces the registered autograd instead.
    losses, _ = _call(teacher, students, target, (*options, *(needs if learns else (False, False))))
    return losses if target is not None else losses[1]


def _rows(logits: Tensor) -> Tensor:
    """(N, C, d1, ...) as contiguous (N * d1 * ..., C); no copy if the classes lie next to each other."""
    if logits.dim() > 2:
        logits = logits.movedim(1, -1).reshape(-1, logits.shape[1])
    return logits.contiguous()


def _promoted(*logits: Tensor) -> list[Tensor]:
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in logits])
    return [x.to(dtype) for x in logits]


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
    """:func:`sandwich_loss` in plain torch: the definition."""
    dtype = _accumulate_dtype(teacher.dtype)
    logits = teacher.to(dtype)
    weight = None if class_weight is None else class_weight.to(dtype)
    labels = target.to(dtype) if target.is_floating_point() else target.long()
    losses = [F.cross_entropy(logits, labels, weight, ignore_index=ignore_index, label_smoothing=label_smoothing)]
    losses += [kl_div_loss_reference(student, teacher.detach(), tau=tau) for student in students]
    return torch.stack(losses)


def kl_div_loss_reference(
    student: Tensor, teacher: Tensor, *, tau: float = 1.0, reduction: str = "batchmean"
) -> Tensor:
    """:func:`kl_div_loss` in plain torch: the definition."""
    dtype = _accumulate_dtype(student.dtype)
    log_q = F.log_softmax(student.to(dtype) / tau, dim=1)
    p = F.softmax(teacher.to(dtype) / tau, dim=1)
    # 0 log 0 = 0, also where the student's logit is -inf too (F.kl_div alone gives NaN there).
    terms = tau * tau * F.kl_div(log_q, p, reduction="none").masked_fill(p == 0, 0)
    if reduction == "batchmean":
        return terms.sum() / student.shape[0] if student.shape[0] else terms.sum() * math.nan
    if reduction == "none":
        return terms
    return terms.sum() if reduction == "sum" else terms.mean()


def sandwich_loss(
    teacher: Tensor,
    students: Sequence[Tensor],
    target: Tensor,
    *,
    tau: float = 1.0,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The losses of all subnets of a sandwich step on one batch (Yu & Huang 2019, arXiv:1903.05134, section 3).

    The max subnet learns from the labels, every other one from the max subnet's detached prediction.

    Args:
        teacher: logits of the max subnet ``(N, C)`` or ``(N, C, d1, ...)``.
        students: logits of the other subnets, each of the teacher's shape; may be empty.
        target: class indices ``(N,)`` or ``(N, d1, ...)``, or class probabilities of the logits' shape.
        tau: temperature of the distillation.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`, like ``class_weight`` and ``ignore_index``.
        class_weight: ``(C,)``.
        ignore_index: rows with this target have no cross-entropy.

    Returns:
        ``(1 + len(students),)``, float32 (float64 for float64 logits): the teacher's mean cross-entropy, then
        ``tau^2 KL(teacher || student)`` of every student: summed over classes and positions, divided by N.

    Raises:
        FastslimValueError: shapes that do not fit, a target that is no class, tau or label_smoothing out of range.
        FastslimTypeError: logits that are not floating point, boolean targets.
    """
    students = list(students)
    check_logits(teacher, students, tau)
    check_target(teacher, target, label_smoothing, class_weight)
    if len({logits.dtype for logits in (teacher, *students)}) > 1:
        teacher, *students = _promoted(teacher, *students)
    if _computed_plainly(teacher, target.is_floating_point()):
        return sandwich_loss_reference(
            teacher,
            students,
            target,
            tau=tau,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
            ignore_index=ignore_index,
        )
    if class_weight is not None:
        class_weight = class_weight.detach().to(_accumulate_dtype(teacher.dtype)).contiguous()
    scale = tau * tau / teacher.shape[0] if teacher.shape[0] else math.nan
    return _run(teacher, students, target.long(), class_weight, tau, label_smoothing, ignore_index, scale)


def kl_div_loss(student: Tensor, teacher: Tensor, *, tau: float = 1.0, reduction: str = "batchmean") -> Tensor:
    """``tau^2 KL(teacher || student)`` of softened predictions (Hinton et al. 2015, arXiv:1503.02531, section 2).

    Args:
        student: logits ``(N, C)`` or ``(N, C, d1, ...)``.
        teacher: logits of the same shape; detach it, else its gradient is computed too (in plain torch).
        tau: temperature.
        reduction: ``"batchmean"`` (sum / N), ``"sum"``, ``"mean"`` (over all elements) or ``"none"``.

    Returns:
        A scalar, or the student's shape with ``"none"``; float32 (float64 for float64 logits).

    Raises:
        FastslimValueError: shapes that differ, tau out of range, an unknown reduction.
        FastslimTypeError: logits that are not floating point.
    """
    if reduction not in REDUCTIONS:
        raise errors.FastslimValueError(f"no reduction {reduction!r}: {errors.nearest(reduction, REDUCTIONS)}")
    check_logits(teacher, (student,), tau)
    if student.dtype != teacher.dtype:
        student, teacher = _promoted(student, teacher)
    plain = reduction == "none" or (teacher.requires_grad and torch.is_grad_enabled())
    if _computed_plainly(student, plain):
        return kl_div_loss_reference(student, teacher, tau=tau, reduction=reduction)
    count = {"batchmean": student.shape[0], "sum": 1, "mean": student.numel()}[reduction]
    scale = tau * tau / count if count else math.nan
    return _run(teacher.detach(), (student,), None, None, tau, 0.0, -100, scale)
