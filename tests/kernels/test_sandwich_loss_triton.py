"""The Triton kernels of sandwich_loss, by Triton's interpreter: the public ops on CPU tensors, against torch."""

from __future__ import annotations

import pytest
import torch
from sandwich_loss_cases import (
    OPTIONS,
    assert_all_as_exact_as_torch,
    batch,
    losses_and_grads,
    torch_losses,
    with_weight,
)

from fastslim.ops import backend, kl_div_loss, sandwich_loss

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(not backend.interpreting(), reason="Triton's interpreter is off: there is a GPU"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # numpy's, about -inf
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]
# (rows, classes): one tile of each size, and more than the largest; 16 bytes at a time and one by one.
SHAPES = [(1, 1), (5, 2), (2, 3), (5, 10), (3, 63), (2, 1000), (1, 1001), (2, 4099), (1, 4104)]


@pytest.fixture(autouse=True)
def triton_computes():
    """The ops run in Triton, and what torch.empty returns is NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    with backend.use_backend("triton"):
        assert backend.choose("sandwich_loss", "cpu", torch.float32, False, 1, 1).backend == "triton"
        yield
    torch.use_deterministic_algorithms(False)


def check(logits, target, **options):
    """The op's losses and gradients, at most twice as wrong as torch's own."""
    ours = losses_and_grads(sandwich_loss, logits, target, **options)
    theirs = losses_and_grads(torch_losses, logits, target, **options)
    exact = losses_and_grads(torch_losses, [x.double() for x in logits], target, **options)
    assert_all_as_exact_as_torch(ours, theirs, exact)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_and_gradients_are_as_exact_as_torchs(shape, options):
    logits, target = batch(*shape, students=1)
    check(logits, target, **with_weight(options, shape[1]))


@pytest.mark.parametrize("students", [0, 1, 3])
@pytest.mark.parametrize("shape", [(3, 10), (2, 1000), (1, 4104)], ids=str)
def test_half_precision_is_as_exact_as_torchs(shape, students):
    logits, target = batch(*shape, dtype=torch.float16, students=students)
    check(logits, target, tau=2.0, label_smoothing=0.1)


def test_half_precision_gradients_survive_until_the_loss_scaler_reaches_them():
    (teacher, student), target = batch(8, 300, dtype=torch.float16, students=1)
    scaled = []
    for dtype in (torch.float16, torch.float64):
        leaves = [logits.to(dtype).requires_grad_() for logits in (teacher * 3, student * 3)]
        with backend.use_backend("triton" if dtype == torch.float16 else "reference"):
            losses = sandwich_loss(leaves[0], leaves[1:], target)
        (losses * (2.0**16 / 1000)).sum().backward()  # as of a batch of 8000, scaled
        scaled.append([leaf.grad.double() for leaf in leaves])
    for ours, truth in zip(*scaled, strict=True):
        assert ((ours == 0) & (truth.abs() > 1e-6)).sum() == 0
        torch.testing.assert_close(ours, truth, rtol=2e-3, atol=1e-6)


def test_200_000_classes_lose_no_digits():
    logits, target = batch(1, 200_000, students=1)
    check(logits, target, tau=2.0, **with_weight({"label_smoothing": 0.1, "class_weight": True}, 200_000))


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
def test_kl_div_loss_of_an_image_is_torchs(reduction):
    (teacher, student), _ = batch(2, 5, 3, 2, students=1)
    results = []
    for kernel in ("triton", "reference"):
        leaf = student.clone().requires_grad_()
        with backend.use_backend(kernel):
            loss = kl_div_loss(leaf, teacher, tau=2.5, reduction=reduction)
        (loss * 0.7).backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])


def test_gradient_is_scaled_by_what_comes_from_above():
    logits, target = batch(4, 33)
    weights = torch.tensor([0.5, -3.0, 1.0])
    for mine, truth in zip(
        losses_and_grads(lambda *a, **k: sandwich_loss(*a, **k) * weights, logits, target),
        losses_and_grads(lambda *a, **k: torch_losses(*a, **k) * weights, logits, target),
        strict=True,
    ):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("learners", [[0], [1, 2], [2], [0, 2]], ids=str)
def test_every_gradient_gets_its_own_scale(learners):
    logits, target = batch(3, 8)
    weights = torch.tensor([2.0, 3.0, 5.0])
    results = []
    for kernel in ("triton", "reference"):
        leaves = [x.clone().requires_grad_(i in learners) for i, x in enumerate(logits)]
        with backend.use_backend(kernel):
            (sandwich_loss(leaves[0], leaves[1:], target) * weights).sum().backward()
        results.append([x.grad for x in leaves])
    for index, (mine, truth) in enumerate(zip(*results, strict=True)):
        assert (mine is None) == (truth is None) == (index not in learners)
        if mine is not None:
            torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-6)


def test_a_second_backward_gives_the_same_gradient():
    logits, target = batch(4, 33)
    leaves = [x.requires_grad_() for x in logits]
    loss = sandwich_loss(leaves[0], leaves[1:], target).sum()
    loss.backward(retain_graph=True)
    first = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad.zero_()
    (2 * loss).backward()
    assert all(torch.equal(x.grad, 2 * once) for x, once in zip(leaves, first, strict=True))


@pytest.mark.parametrize("classes", [20, 4100])
def test_masked_classes_have_no_gradient_and_no_loss(classes):
    (teacher, student), target = batch(2, classes, students=1)
    teacher[:, 5:9] = student[:, 5:9] = -torch.inf
    target = target % 5
    losses, *grads = losses_and_grads(sandwich_loss, [teacher, student], target)
    kept = [torch.cat([x[:, :5], x[:, 9:]], dim=1).double() for x in (teacher, student)]
    exact, *exact_grads = losses_and_grads(torch_losses, kept, target)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-6)
    for grad, truth in zip(grads, exact_grads, strict=True):
        assert (grad[:, 5:9] == 0).all()
        torch.testing.assert_close(torch.cat([grad[:, :5], grad[:, 9:]], 1).double(), truth, rtol=1e-4, atol=1e-7)


def test_a_class_only_the_student_excludes_costs_infinitely_much():
    (teacher, student), target = batch(2, 5, students=1)
    student[0, 3] = -torch.inf
    assert sandwich_loss(teacher, [student], target)[1] == torch.inf


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("classes", "column"), [(19, 18), (4100, 0)])
def test_a_broken_logit_is_never_hidden(classes, column, value):
    logits, target = batch(3, classes)
    logits[1][1, column] = value
    losses, teacher_grad, *grads = losses_and_grads(sandwich_loss, logits, target)
    assert losses.isnan().tolist() == [False, True, False]
    assert not teacher_grad.isnan().any() and not grads[1].isnan().any()
    assert grads[0].isnan().any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("wrong", [10, -1, 1 << 40])
def test_a_target_that_is_no_class_makes_its_row_nan(wrong):
    logits, target = batch(4, 10, students=1)
    target[2] = wrong
    losses, teacher_grad, student_grad = losses_and_grads(sandwich_loss, logits, target, label_smoothing=0.1)
    assert losses.isnan().tolist() == [True, False] and not student_grad.isnan().any()
    assert teacher_grad.isnan().all(dim=1).tolist() == [False, False, True, False]
    assert teacher_grad.isnan().any(dim=1).tolist() == [False, False, True, False]


def test_all_targets_ignored_gives_nan_and_no_gradient():
    logits, _ = batch(3, 7, students=1)
    losses, teacher_grad, _ = losses_and_grads(sandwich_loss, logits, torch.full((3,), -100))
    assert losses.isnan().tolist() == [True, False]
    assert (teacher_grad == 0).all()


def test_no_row_gives_nan_and_empty_gradients():
    logits, target = batch(0, 10)
    losses, *grads = losses_and_grads(sandwich_loss, logits, target)
    assert losses.isnan().all() and all(grad.shape == (0, 10) for grad in grads)


@pytest.mark.parametrize("classes", [33, 4100])
def test_equal_logits_have_no_divergence(classes):
    (teacher,), _ = batch(2, classes, students=0)
    student = teacher.clone().requires_grad_()
    loss = kl_div_loss(student, teacher, tau=3.0)
    loss.backward()
    assert loss == 0 and (student.grad == 0).all()


def test_repeats_are_bitwise_equal():
    logits, target = batch(5, 65)
    first, second = (losses_and_grads(sandwich_loss, logits, target, label_smoothing=0.1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("labelled", [True, False])
def test_raw_op_passes_opcheck(labelled):
    (teacher, *students), target = batch(3, 10)
    for logits in (teacher, *students) if labelled else students:
        logits.requires_grad_()
    arguments = (teacher, students, target if labelled else None, None, 2.0, 0.1, -100, 0.5, labelled, True)
    torch.library.opcheck(torch.ops.fastslim.sandwich_loss_triton.default, arguments)
    torch.library.opcheck(torch.ops.fastslim.scale_gradients_triton.default, (torch.randn(2, 3, 8), torch.ones(2)))


def test_compiled_code_traces_the_op():
    logits, target = batch(4, 11)
    compiled = torch.compile(sandwich_loss, backend="aot_eager", fullgraph=True)
    for mine, truth in zip(
        losses_and_grads(compiled, logits, target), losses_and_grads(sandwich_loss, logits, target), strict=True
    ):
        assert torch.equal(mine, truth)


def test_raw_op_refuses_what_would_read_out_of_bounds():
    (teacher, student), target = batch(4, 10, students=1)
    numbers = (2.0, 0.1, -100, 0.5, True, True)
    op = torch.ops.fastslim.sandwich_loss_triton
    with pytest.raises(ValueError, match="of one shape"):
        op(teacher, [student[:3]], target, None, *numbers)
    with pytest.raises(ValueError, match="one dtype"):
        op(teacher, [student.half()], target, None, *numbers)
    with pytest.raises(ValueError, match=r"target is a contiguous \(4,\)"):
        op(teacher, [], target.int(), None, *numbers)
    with pytest.raises(ValueError, match="class_weight"):
        op(teacher, [], target, torch.ones(9), *numbers)


def test_what_triton_lacks_is_computed_by_others():
    for dtype in (torch.float64, torch.bfloat16):
        choice = backend.choose("sandwich_loss", "cpu", dtype, False, 1, 1)
        assert choice.backend == "cpp" and "'triton' was asked for but" in choice.reason
