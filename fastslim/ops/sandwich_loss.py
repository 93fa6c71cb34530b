"""The losses of a sandwich step: cross-entropy of the max subnet and tau^2 KL of its students, with their gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastslim import errors
from fastslim.ops import backend
from fastslim.ops.sandwich_loss_checks import check_logits, check_target, explain_target
from fastslim.ops.sandwich_loss_reference import accumulate_dtype, kl_div_loss_reference, sandwich_loss_reference
from fastslim.ops.sandwich_loss_schema import op

REDUCTIONS = ("batchmean", "sum", "mean", "none")
_DTYPES = {
    "cpp": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


def _refuses(
    kernel: str, target: str, dtype: torch.dtype, soft: bool = False, rows: int = 0, classes: int = 0
) -> str | None:
    if kernel == "reference":
        return None
    if soft:
        return "class probabilities as target, reduction 'none' and a teacher that learns are the reference's"
    if dtype not in _DTYPES[kernel]:
        return f"it computes {', '.join(map(str, _DTYPES[kernel]))}, not {dtype}"
    if kernel == "triton" and target == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter is wrong in bfloat16"
    return None


def _rule(target: str, dtype: torch.dtype, soft: bool = False, rows: int = 0, classes: int = 0) -> backend.Choice:
    reference = backend.Choice("reference", f"no kernel computes {dtype} on {target}")
    if soft:
        return backend.Choice("reference", "class probabilities as target, reduction 'none' and a teacher that learns")
    if backend.is_gpu(target):
        kernels = tuple(kernel for kernel in ("cuda", "triton") if dtype in _DTYPES[kernel])
        return backend.gpu_choice("sandwich_loss", target, dtype, kernels, reference, sizes=(rows, classes))
    if target == "cpu" and dtype in _DTYPES["cpp"]:
        return backend.Choice("cpp", "loss and gradient from one read of the logits")
    return reference


backend.register("sandwich_loss", ("reference", "cpp", "cuda", "triton"), _rule, _refuses)


def _chosen(logits: Tensor, soft: bool) -> str:
    classes = logits.shape[1]
    target = backend.target_of(logits)
    return backend.choose("sandwich_loss", target, logits.dtype, soft, logits.numel() // classes, classes).backend


class _Fused(torch.autograd.Function):
    """The kernel's gradient goes out at the first backward; a later one (retain_graph) computes it again."""

    @staticmethod
    def forward(
        ctx: Any, target: Tensor | None, options: tuple[Any, ...], teacher: Tensor, *students: Tensor
    ) -> Tensor:
        needs = ctx.needs_input_grad[2:]
        ctx.options = (*options, needs[0] and target is not None, any(needs[1:]))
        ctx.shape = teacher.shape
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
        wanted = slice(None if teacher_grad else 1, None if student_grad else 1)
        _scale(ctx.options[0], grads, grad_losses[wanted] if grad_losses.dim() else grad_losses.reshape(1))
        remaining = iter(_in_layout(grads, ctx.shape).unbind(0))
        result: list[Tensor | None] = []
        for index, needed in enumerate(ctx.needs_input_grad[2:]):
            grad = next(remaining) if (student_grad if index else teacher_grad) else None
            result.append(grad if needed else None)
        return None, None, *result


def _scale(kernel: str, grads: Tensor, scales: Tensor) -> None:
    """Multiplies every gradient with its scale in place, without a host sync on a GPU."""
    if kernel == "cpp":
        for index, scale in enumerate(scales.tolist()):
            if scale != 1.0:
                grads[index].mul_(scale)
    else:
        op("scale_gradients", kernel)(grads, scales)


def _call(
    teacher: Tensor, students: Sequence[Tensor], target: Tensor | None, options: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Runs the op on (rows, classes) views; options: the backend, then the op's own, `class_weight` first."""
    kernel, class_weight, tau, label_smoothing, ignore_index, *rest = options
    rows = [_rows(logits) for logits in (teacher, *students)]
    labels = None if target is None else target.reshape(-1).contiguous()
    try:
        return op("sandwich_loss", kernel)(
            rows[0], rows[1:], labels, class_weight, tau, label_smoothing, ignore_index, *rest
        )
    except RuntimeError as error:
        if kernel == "cpp":  # a GPU's kernels refuse no target
            explain_target(target, teacher.shape[1], ignore_index)
        raise error


def _in_layout(grads: Tensor, shape: torch.Size) -> Tensor:
    """Gradients (count, rows, classes) as (count, N, C, d1, ...)."""
    return grads if len(shape) == 2 else grads.view(-1, shape[0], *shape[2:], shape[1]).movedim(-1, 2)


def _run(teacher: Tensor, students: Sequence[Tensor], target: Tensor | None, *options: Any) -> Tensor:
    """The losses ``(1 + students,)``; without a target the one student's KL alone."""
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
    """Logits of one data type; of float16 that learns, float32.

    The kernels write the gradient of a mean before a loss scaler's factor reaches it: too small for float16.
    """
    dtype = logits[0].dtype
    if dtype != torch.float16 and all(x.dtype == dtype for x in logits):
        return list(logits)  # a call of `to` for each costs 4 us
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in logits])
    if dtype == torch.float16 and torch.is_grad_enabled() and any(x.requires_grad for x in logits):
        dtype = torch.float32
    return [x.to(dtype) for x in logits]


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

        A target that is no class makes the row's loss and gradient NaN on a GPU: to raise there would mean to
        wait for the GPU in every step.

    Raises:
        FastslimValueError: shapes that do not fit, tau or label_smoothing out of range, and on a CPU a target
            that is no class.
        FastslimTypeError: logits that are not floating point, boolean targets.
    """
    students = list(students)
    check_logits(teacher, students, tau)
    check_target(teacher, target, label_smoothing, class_weight)
    teacher, *students = _promoted(teacher, *students)
    kernel = _chosen(teacher, target.is_floating_point())
    if kernel == "reference":
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
        class_weight = class_weight.detach().to(accumulate_dtype(teacher.dtype)).contiguous()
    scale = tau * tau / teacher.shape[0] if teacher.shape[0] else math.nan
    return _run(teacher, students, target.long(), kernel, class_weight, tau, label_smoothing, ignore_index, scale)


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
    student, teacher = _promoted(student, teacher)
    plain = reduction == "none" or (teacher.requires_grad and torch.is_grad_enabled())
    kernel = _chosen(student, plain)
    if kernel == "reference":
        return kl_div_loss_reference(student, teacher, tau=tau, reduction=reduction)
    count = {"batchmean": student.shape[0], "sum": 1, "mean": student.numel()}[reduction]
    scale = tau * tau / count if count else math.nan
    return _run(teacher.detach(), (student,), None, kernel, None, tau, 0.0, -100, scale)
