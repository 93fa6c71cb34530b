"""The ops of sandwich_loss: schemas, shapes, Triton's implementation, and the autograd that torch.compile traces."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from fastslim.ops import backend
from fastslim.ops.sandwich_loss_reference import accumulate_dtype

_LIBRARY = torch.library.Library("fastslim", "FRAGMENT")
# losses (1 + students,) in the accumulation dtype; grads (teacher_grad + students * student_grad, rows, classes).
_SCHEMA = (
    "(Tensor teacher, Tensor[] students, Tensor? target, Tensor? class_weight, float tau, "
    "float label_smoothing, int ignore_index, float kl_scale, bool teacher_grad, bool student_grad) "
    "-> (Tensor losses, Tensor grads)"
)
# grads (count, rows, classes) times scales (count,); read on the device, where a scale of 1 costs no memory traffic.
_SCALE_SCHEMA = "(Tensor(a!) grads, Tensor scales) -> ()"


def op(name: str, kernel: str) -> Any:
    """The op of a backend: torch tells the CPU's and CUDA's kernels apart, Triton's have a name of their own."""
    return getattr(torch.ops.fastslim, f"{name}_triton" if kernel == "triton" else name)


def _triton(function: str, *arguments: Any) -> Any:
    kernels = importlib.import_module("fastslim.kernels.sandwich_loss")  # importing Triton takes its time
    return getattr(kernels, function)(*arguments)


def _fake(
    teacher, students, target, class_weight, tau, label_smoothing, ignore_index, kl_scale, teacher_grad, student_grad
):
    torch._check(teacher.dim() == 2, lambda: "logits are (rows, classes)")
    count = int(teacher_grad and target is not None) + (len(students) if student_grad else 0)
    losses = teacher.new_empty(1 + len(students), dtype=accumulate_dtype(teacher.dtype))
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


for _kernel in ("", "_triton"):
    _LIBRARY.define(f"sandwich_loss{_kernel}{_SCHEMA}")
    _LIBRARY.define(f"scale_gradients{_kernel}{_SCALE_SCHEMA}")
    _name = f"fastslim::sandwich_loss{_kernel}"
    torch.library.register_fake(_name, _fake, lib=_LIBRARY)
    torch.library.register_autograd(_name, _backward, setup_context=_setup_context, lib=_LIBRARY)
    torch.library.register_fake(f"fastslim::scale_gradients{_kernel}", lambda grads, scales: None, lib=_LIBRARY)
for _key in ("CUDA", "CPU") if backend.interpreting() else ("CUDA",):
    _LIBRARY.impl("sandwich_loss_triton", functools.partial(_triton, "sandwich_loss"), _key)
    _LIBRARY.impl("scale_gradients_triton", functools.partial(_triton, "scale_gradients"), _key)
