"""The CUDA kernels of sandwich_loss: run on the CPU always, compiled where nvcc is, run on a GPU if there is one."""

from __future__ import annotations

import ctypes

import pytest
import resources
import torch
from emulation import emulated, pointer
from sandwich_loss_cases import (
    OPTIONS,
    assert_all_as_exact_as_torch,
    batch,
    losses_and_grads,
    torch_losses,
    with_weight,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# (rows, classes): a warp, a block and a stream of tiles a row; 16 bytes at a time (classes % 8 == 0) and one by one.
SHAPES = [(1, 1), (9, 2), (3, 3), (5, 10), (3, 63), (10, 128), (3, 1000), (2, 1001), (2, 4099), (1, 8200)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    library = emulated("sandwich_loss", tmp_path_factory.mktemp("emulation"))
    library.workspace.restype = ctypes.c_int64
    return library


def run(
    library, teacher, students, target=None, *, tau=1.0, label_smoothing=0.0, class_weight=None, ignore_index=-100,
    teacher_grad=True, student_grad=True,
):  # fmt: skip
    """Losses and gradients of the kernels; everything they write starts as NaN."""
    rows, classes = teacher.shape
    dtype = str(teacher.dtype).removeprefix("torch.")
    accumulate = torch.float64 if teacher.dtype == torch.float64 else torch.float32
    weight = None if class_weight is None else class_weight.to(accumulate)
    losses = torch.full((1 + len(students),), torch.nan, dtype=accumulate)
    grads = [torch.full_like(teacher, torch.nan)] if target is not None and teacher_grad else []
    student_grads = torch.full((len(students), *teacher.shape), torch.nan, dtype=teacher.dtype)
    workspace = torch.full((library.workspace(ctypes.c_int64(len(students))),), torch.nan, dtype=torch.float64)
    tensors = [teacher, target, weight, grads[0] if grads else None, student_grads if student_grad else None]
    pointers = [pointer(x) for x in (*tensors, losses, workspace, *students)]
    getattr(library, f"run_{dtype}")(
        (ctypes.c_void_p * len(pointers))(*pointers),
        (ctypes.c_int64 * 5)(rows, classes, len(students), ignore_index, target is not None),
        (ctypes.c_double * 3)(tau, label_smoothing, tau * tau / rows if rows else torch.nan),
    )
    return [losses, *grads, *(student_grads.unbind(0) if student_grad else ())]


def check(library, logits, target, **options):
    """The kernels' losses and gradients, at most twice as wrong as torch's own."""
    ours = run(library, logits[0], logits[1:], target, **options)
    theirs = losses_and_grads(torch_losses, logits, target, **options)
    assert_all_as_exact_as_torch(
        ours, theirs, losses_and_grads(torch_losses, [x.double() for x in logits], target, **options)
    )
    return ours


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_run_by_the_host_are_as_exact_as_torch(library, shape, options):
    logits, target = batch(*shape, students=1)
    check(library, logits, target, **with_weight(options, shape[1]))


@pytest.mark.parametrize("shape", [(9, 10), (5, 16), (2, 136), (2, 4104)], ids=str)
@pytest.mark.parametrize("students", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_as_exact_as_torch(library, dtype, students, shape):
    logits, target = batch(*shape, dtype=dtype, students=students)
    check(library, logits, target, tau=2.0, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_200_000_classes_lose_no_digits(library, dtype):
    logits, target = batch(2, 200_000, dtype=dtype, students=1)
    options = with_weight({"label_smoothing": 0.1, "class_weight": True}, 200_000)
    check(library, logits, target, tau=2.0, **options)


def test_many_short_rows_take_a_warp_each(library):
    logits, target = batch(2050, 129, students=1)
    check(library, logits, target, tau=2.0)


def test_more_rows_than_groups_of_threads(library):
    logits, target = batch(8192 + 9, 3, students=1)
    check(library, logits, target)


def test_more_students_than_one_launch_takes(library):
    logits, target = batch(3, 10, students=33)
    check(library, logits, target, tau=2.0)


@pytest.mark.parametrize("classes", [10, 1000, 8200])
def test_a_student_without_labels_gets_the_same_loss_and_gradient(library, classes):
    (teacher, student), target = batch(2, classes, students=1)
    with_labels = run(library, teacher, [student], target, tau=2.0)
    alone = run(library, teacher, [student], tau=2.0)
    assert alone[0].tolist() == [0, with_labels[0][1].item()]
    assert torch.equal(alone[1], with_labels[2])


def test_losses_without_gradients_are_the_same(library):
    logits, target = batch(4, 1000)
    options = with_weight({"label_smoothing": 0.1, "class_weight": True}, 1000)
    (losses,) = run(library, logits[0], logits[1:], target, teacher_grad=False, student_grad=False, **options)
    assert torch.equal(losses, run(library, logits[0], logits[1:], target, **options)[0])


def test_logits_that_are_not_aligned_are_read_one_by_one(library):
    logits, target = batch(3, 1000, students=1)
    shifted = [torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x) for x in logits]
    for mine, truth in zip(
        run(library, shifted[0], shifted[1:], target), run(library, logits[0], logits[1:], target), strict=True
    ):
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [37, 152, 8200])
def test_extreme_logits_stay_finite_and_right(library, classes, dtype):
    logits, target = batch(3, classes, dtype=dtype, scale=1e4, students=1)
    assert all(x.isfinite().all() for x in check(library, logits, target, tau=0.1))


@pytest.mark.parametrize("classes", [20, 4100, 8200])
def test_masked_classes_have_no_gradient_and_no_loss(library, classes):
    (teacher, student), target = batch(3, classes, students=1)
    teacher[:, 5:9] = student[:, 5:9] = -torch.inf
    kept = [torch.cat([x[:, :5], x[:, 9:]], dim=1) for x in (teacher, student)]
    target = target % 5
    losses, *grads = run(library, teacher, [student], target)
    exact, *exact_grads = losses_and_grads(torch_losses, [x.double() for x in kept], target)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-6)
    for grad, truth in zip(grads, exact_grads, strict=True):
        assert (grad[:, 5:9] == 0).all()
        torch.testing.assert_close(torch.cat([grad[:, :5], grad[:, 9:]], 1).double(), truth, rtol=1e-4, atol=1e-7)


def test_a_class_only_the_student_excludes_costs_infinitely_much(library):
    (teacher, student), target = batch(2, 5, students=1)
    student[0, 3] = -torch.inf
    assert run(library, teacher, [student], target)[0][1] == torch.inf


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("classes", "column"), [(19, 0), (19, 18), (1000, 999), (8200, 8199)])
def test_a_broken_logit_is_never_hidden(library, classes, column, value):
    logits, target = batch(3, classes)
    logits[1][1, column] = value
    losses, teacher_grad, *grads = run(library, logits[0], logits[1:], target)
    assert losses.isnan().tolist() == [False, True, False]
    assert not teacher_grad.isnan().any() and not grads[1].isnan().any()
    assert grads[0].isnan().any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("wrong", [10, -1, 1 << 40])
def test_a_target_that_is_no_class_makes_its_row_nan(library, wrong):
    logits, target = batch(4, 10, students=1)
    target[2] = wrong
    losses, teacher_grad, student_grad = run(library, logits[0], logits[1:], target, label_smoothing=0.1)
    assert losses.isnan().tolist() == [True, False] and not student_grad.isnan().any()
    assert teacher_grad.isnan().all(dim=1).tolist() == [False, False, True, False]
    assert teacher_grad.isnan().any(dim=1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("classes", [7, 1000])
def test_all_targets_ignored_gives_nan_and_no_gradient(library, classes):
    logits, _ = batch(3, classes, students=1)
    losses, teacher_grad, _ = run(library, logits[0], logits[1:], torch.full((3,), -100))
    assert losses.isnan().tolist() == [True, False]
    assert (teacher_grad == 0).all()


def test_no_row_gives_nan_and_empty_gradients(library):
    logits, target = batch(0, 10)
    losses, *grads = run(library, logits[0], logits[1:], target)
    assert losses.isnan().all() and all(grad.shape == (0, 10) for grad in grads)


@pytest.mark.parametrize("classes", [33, 1000, 8200])
def test_equal_logits_have_no_divergence(library, classes):
    (teacher,), target = batch(3, classes, students=0)
    losses, _, grad = run(library, teacher, [teacher.clone()], target, tau=3.0)
    assert losses[1] == 0 and (grad == 0).all()


@pytest.mark.parametrize("shape", [(700, 10), (3, 1000), (2, 8200)], ids=str)
def test_repeats_are_bitwise_equal(library, shape):
    logits, target = batch(*shape, dtype=torch.bfloat16)
    first, second = (run(library, logits[0], logits[1:], target, tau=2.0, label_smoothing=0.1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("classes", [5, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_scaled_by_numbers_that_only_the_device_knows(library, dtype, classes):
    grads = torch.randn(3, 7, classes).to(dtype)
    scales = torch.tensor([0.5, 9.0, 1.0, 9.0, -3.0, 9.0], dtype=torch.float64 if dtype == torch.float64 else None)
    expected = torch.stack([grad * scale for grad, scale in zip(grads, (0.5, 1.0, -3.0), strict=True)])
    size = [ctypes.c_int64(number) for number in (3, 7 * classes, 2)]
    getattr(library, f"scale_{str(dtype).removeprefix('torch.')}")(pointer(grads), pointer(scales), *size)
    assert torch.equal(grads, expected)


@pytest.mark.skipif(not resources.tool("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_kernels_compile_within_the_chips_limits(architecture):
    kernels = resources.cuda_resources("sandwich_loss", architecture)
    assert {kernel.name: kernel.problems() for kernel in kernels if kernel.problems()} == {}
    in_vectors = [kernel for kernel in kernels if any(f", {number}" in kernel.name for number in ("4", "8"))]
    assert len(in_vectors) == 12  # in three dtypes: rows of a warp, of a block and streamed, and the scaling
    for kernel in in_vectors:
        assert kernel.wide
        assert kernel.registers <= 128  # two blocks of 256 threads stay resident
