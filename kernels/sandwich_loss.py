"""sandwich_loss in Triton: one launch for the teacher's cross-entropy, one for every student's KL, two for sums."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastslim.kernels.sandwich_loss_rows import (
    sandwich_loss_cross_entropy_kernel,
    sandwich_loss_kl_kernel,
    sum_of_parts,
)
from fastslim.kernels.variant import Variant

PARTS = 32  # of the sums of weights, at most: each a program's
BLOCK = 1024  # what a program sums or scales at once
PROGRAMS = 16384  # walk over the rows; each keeps the sum of its rows' losses
# Classes of a tile, and warps. A row in one tile is read once, more classes in tiles of the largest size.
TILES = ((64, 1), (1024, 4), (2048, 8))


@triton.jit(do_not_specialize=["rows", "classes", "ignore_index"])
def sandwich_loss_weights_kernel(
    target, class_weight, parts, rows, classes, ignore_index, TILE: tl.constexpr, PARTS: tl.constexpr
):
    """Writes parts [2, PARTS]: sums of the targets' class weights, and of all class weights."""
    part = tl.program_id(0)
    targets = tl.zeros([TILE], tl.float64)
    for first in range(part * TILE, rows, tl.num_programs(0) * TILE):
        row = first + tl.arange(0, TILE)
        y = tl.load(target + row, mask=row < rows, other=-1)
        valid = (row < rows) & (y != ignore_index) & (y >= 0) & (y < classes)
        if class_weight is None:
            targets += valid.to(tl.float64)
        else:
            targets += tl.load(class_weight + y, mask=valid, other=0).to(tl.float64)
    tl.store(parts + part, tl.sum(targets, 0))
    if class_weight is not None:
        every = tl.zeros([TILE], tl.float64)
        for first in range(part * TILE, classes, tl.num_programs(0) * TILE):
            c = first + tl.arange(0, TILE)
            every += tl.load(class_weight + c, mask=c < classes, other=0).to(tl.float64)
        tl.store(parts + PARTS + part, tl.sum(every, 0))


@triton.jit(do_not_specialize=["count", "programs"])
def sandwich_loss_sum_kernel(
    parts, weight_parts, count, losses, programs, kl_scale,
    CROSS_ENTROPY: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Writes losses [i], from parts [i, programs] in a fixed order."""
    i = tl.program_id(0)
    sums = tl.zeros([TILE], tl.float64)
    for first in range(0, programs, TILE):
        program = first + tl.arange(0, TILE)
        sums += tl.load(parts + i * programs + program, mask=program < programs, other=0)
    total = tl.sum(sums, 0)
    if i > 0:
        total *= kl_scale
    elif CROSS_ENTROPY:
        total /= sum_of_parts(weight_parts, count, PARTS)
    else:
        total = tl.zeros([], tl.float64)
    tl.store(losses + i, total.to(tl.float32))


@triton.jit(do_not_specialize=["size", "stride"])
def scale_gradients_kernel(grads, scales, size, stride, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """Multiplies grads [count, size * VECTOR] by scales [count]; a scale of 1 costs no memory traffic."""
    scale = tl.load(scales + tl.program_id(1) * stride)
    if scale != 1.0:
        numbers = size.to(tl.int64) * VECTOR
        row = grads + tl.program_id(1) * numbers
        for first in range(tl.program_id(0).to(tl.int64) * TILE, numbers, tl.num_programs(0) * TILE):
            at = first + tl.arange(0, TILE)
            inside = at < numbers
            g = tl.load(row + at, mask=inside).to(tl.float32) * scale
            tl.store(row + at, g.to(grads.dtype.element_ty), mask=inside)


def sandwich_loss(
    teacher: Tensor,
    students: Sequence[Tensor],
    target: Tensor | None,
    class_weight: Tensor | None,
    tau: float,
    label_smoothing: float,
    ignore_index: int,
    kl_scale: float,
    teacher_grad: bool,
    student_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Losses ``(1 + students,)`` in float32 and gradients ``(count, rows, classes)``, see `fastslim.ops`.

    Raises:
        ValueError: tensors that would be read out of bounds.
    """
    _check(teacher, students, target, class_weight)
    rows, classes = teacher.shape
    teacher_grad = teacher_grad and target is not None
    count = int(teacher_grad) + (len(students) if student_grad else 0)
    grads = teacher.new_empty(count, rows, classes)
    losses = teacher.new_empty(1 + len(students), dtype=torch.float32)
    programs = min(rows, PROGRAMS)
    parts = teacher.new_empty(1 + len(students), programs, dtype=torch.float64)
    weights = teacher.new_empty(2, PARTS, dtype=torch.float64)
    count = max(1, min(triton.cdiv(rows if class_weight is None else max(rows, classes), BLOCK), PARTS))
    vector = _vector(teacher, classes)
    tile, warps = next((size for size in TILES if classes <= size[0]), TILES[-1])
    options = {"STREAMS": classes > tile, "TILE": tile, "VECTOR": vector, "num_warps": warps}
    with _device_of(teacher):
        if target is not None:
            sandwich_loss_weights_kernel[(count,)](
                target, class_weight, weights, rows, classes, ignore_index, TILE=BLOCK, PARTS=PARTS
            )
        if target is not None and rows:
            sandwich_loss_cross_entropy_kernel[(programs,)](
                teacher, target, class_weight, weights, count, grads[0] if teacher_grad else teacher, parts[0], rows,
                classes // vector, ignore_index, 1 - label_smoothing, label_smoothing / classes,
                SMOOTH=label_smoothing != 0, GRAD=teacher_grad,
                PARTS=PARTS, **options,
            )  # fmt: skip
        for index, student in enumerate(students if rows else ()):
            sandwich_loss_kl_kernel[(programs,)](
                teacher, student, grads[int(teacher_grad) + index] if student_grad else student, parts[1 + index],
                rows, classes // vector, 1 / tau, kl_scale / tau, GRAD=student_grad, **options,
            )  # fmt: skip
        sandwich_loss_sum_kernel[(1 + len(students),)](
            parts,
            weights,
            count,
            losses,
            programs,
            kl_scale,
            CROSS_ENTROPY=target is not None,
            TILE=BLOCK,
            PARTS=PARTS,
        )
    return losses, grads


def scale_gradients(grads: Tensor, scales: Tensor) -> None:
    """``grads[i] *= scales[i]`` in place; grads ``(count, rows, classes)`` contiguous, scales ``(count,)`` float32."""
    size = grads.shape[1] * grads.shape[2]
    if not grads.numel():
        return
    vector = _vector(grads, size)
    grid = min(triton.cdiv(size, BLOCK), 1024), grads.shape[0]
    with _device_of(grads):
        scale_gradients_kernel[grid](grads, scales, size // vector, scales.stride(0), TILE=BLOCK, VECTOR=vector)


def _check(teacher: Tensor, students: Sequence[Tensor], target: Tensor | None, class_weight: Tensor | None) -> None:
    logits = (teacher, *students)
    if any(x.shape != teacher.shape or x.dim() != 2 or not x.is_contiguous() for x in logits):
        raise ValueError("sandwich_loss: logits are contiguous (rows, classes) tensors of one shape")
    if any(x.dtype != teacher.dtype or x.device != teacher.device for x in logits):
        raise ValueError("sandwich_loss: logits have one dtype and device")
    for name, x, size, dtype in (
        ("target", target, teacher.shape[0], torch.int64),
        ("class_weight", class_weight, teacher.shape[1], torch.float32),
    ):
        if x is None:
            continue
        if x.shape != (size,) or x.dtype != dtype or not x.is_contiguous() or x.device != teacher.device:
            raise ValueError(f"sandwich_loss: {name} is a contiguous ({size},) {dtype} tensor on the logits' device")


def _vector(x: Tensor, size: int) -> int:
    """Numbers of one 16-byte access, if rows of `size` are a multiple of them."""
    vector = 16 // x.element_size()
    return vector if size % vector == 0 else 1


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def variants() -> list[Variant]:
    """Rows of ImageNet's classes, in one tile, and longer ones, in a stream of tiles; the sums; the scaling."""
    types: dict[str, str] = dict.fromkeys(("losses", "parts", "weight_parts"), "*fp64") | {"target": "*i64"}
    types |= dict.fromkeys(("rows", "groups", "classes", "ignore_index", "size", "stride", "count", "programs"), "i32")
    types |= dict.fromkeys(("hardness", "smooth", "inverse_tau", "grad_scale", "kl_scale"), "fp32")
    types |= dict.fromkeys(("class_weight", "scales"), "*fp32")
    sums = {"TILE": BLOCK, "PARTS": PARTS}
    weights = {"class_weight": None, **sums}
    finish = {"CROSS_ENTROPY": True, **sums}
    found = [
        Variant("plain", sandwich_loss_weights_kernel, types, weights, bound="latency"),
        Variant("plain", sandwich_loss_sum_kernel, types | {"losses": "*fp32"}, finish, bound="latency"),
    ]
    for name, dtype, vector in (("bf16", "*bf16", 8), ("fp32", "*fp32", 4)):
        logits = types | dict.fromkeys(("teacher", "student", "grad"), dtype)
        for tile, warps in TILES[1:]:
            streams = tile == TILES[-1][0]
            kl = {"GRAD": True, "STREAMS": streams, "TILE": tile, "VECTOR": vector}
            ce = kl | {"PARTS": PARTS, "SMOOTH": not streams} | ({"class_weight": None} if streams else {})
            label = f"{name}_{'stream' if streams else 'tile'}"
            for kernel, constants in ((sandwich_loss_kl_kernel, kl), (sandwich_loss_cross_entropy_kernel, ce)):
                pointers = [key for key in ("teacher", "student", "grad", "class_weight") if key in kernel.arg_names]
                aligned = tuple(key for key in pointers if key not in constants)
                found.append(Variant(label, kernel, logits, constants, divisible=aligned, num_warps=warps))
    scaling = {"TILE": BLOCK, "VECTOR": 8}
    return [*found, Variant("bf16", scale_gradients_kernel, types | {"grads": "*bf16"}, scaling, divisible=("grads",))]
