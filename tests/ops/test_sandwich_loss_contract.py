"""What sandwich_loss and kl_div_loss promise beside numbers: autograd, compiled code, dtypes, and what they refuse."""

import pytest
import torch
from sandwich_loss_cases import batch, losses_and_grads, torch_losses

from fastslim import errors
from fastslim.ops import backend, kl_div_loss, sandwich_loss
from fastslim.ops.sandwich_loss import kl_div_loss_reference


def test_only_the_gradients_asked_for_are_computed():
    (teacher, *students), target = batch(4, 10)
    students[1].requires_grad_()
    sandwich_loss(teacher, students, target).sum().backward()
    assert teacher.grad is None and students[0].grad is None
    torch.testing.assert_close(
        students[1].grad, losses_and_grads(torch_losses, [teacher, students[1]], target)[2], rtol=1e-5, atol=1e-7
    )


def test_gradient_is_scaled_by_what_comes_from_above():
    logits, target = batch(4, 33, dtype=torch.float64)
    weights = torch.tensor([0.5, -3.0, 1.0], dtype=torch.float64)
    for mine, truth in zip(
        losses_and_grads(lambda *a, **k: sandwich_loss(*a, **k) * weights, logits, target),
        losses_and_grads(lambda *a, **k: torch_losses(*a, **k) * weights, logits, target),
        strict=True,
    ):
        torch.testing.assert_close(mine, truth)


def test_a_second_backward_gives_the_same_gradient():
    logits, target = batch(4, 33)
    leaves = [x.requires_grad_() for x in logits]
    loss = sandwich_loss(leaves[0], leaves[1:], target).sum()
    loss.backward(retain_graph=True)
    first = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad.zero_()  # what the op handed out belongs to the caller
    loss.backward(retain_graph=True)
    assert all(torch.equal(x.grad, once) for x, once in zip(leaves, first, strict=True))
    loss.backward()
    assert all(torch.equal(x.grad, 2 * once) for x, once in zip(leaves, first, strict=True))


def test_second_derivatives_are_the_references():
    (teacher, student), _ = batch(2, 5, dtype=torch.float64, students=1)
    student.requires_grad_()
    with pytest.raises(errors.FastslimRuntimeError, match="first derivatives only"):
        torch.autograd.grad(kl_div_loss(student, teacher), student, create_graph=True)
    with backend.use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda s: kl_div_loss(s, teacher), student)


def test_a_loss_can_be_changed_in_place():
    (teacher, student), target = batch(2, 5, students=1)
    loss = kl_div_loss(student.requires_grad_(), teacher)
    loss *= 2
    losses = sandwich_loss(teacher, [student], target)
    losses += 1
    assert torch.equal(torch.autograd.grad(loss, student)[0], 2 * torch.autograd.grad(losses[1], student)[0])


def test_a_forced_reference_computes_the_same():
    logits, target = batch(4, 9, dtype=torch.float64)
    ours = losses_and_grads(sandwich_loss, logits, target)
    with backend.use_backend("reference"):
        forced = losses_and_grads(sandwich_loss, logits, target)
    for mine, truth in zip(ours, forced, strict=True):
        torch.testing.assert_close(mine, truth)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.uint8])
def test_targets_may_be_any_integers(index_dtype):
    logits, target = batch(4, 9)
    assert torch.equal(
        sandwich_loss(logits[0], logits[1:], target.to(index_dtype)), sandwich_loss(logits[0], logits[1:], target)
    )


def test_mixed_dtypes_are_computed_in_the_wider_one():
    (teacher, student), target = batch(4, 9, students=1)
    leaf = student.bfloat16().requires_grad_()
    loss = sandwich_loss(teacher, [leaf], target)[1]
    loss.backward()
    assert leaf.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, kl_div_loss_reference(leaf.float(), teacher))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("labelled", [True, False])
def test_raw_op_passes_opcheck(needs, labelled):
    (teacher, *students), target = batch(3, 10)
    teacher.requires_grad_(needs[0] and labelled)
    for student in students:
        student.requires_grad_(needs[1])
    weight = torch.linspace(0.5, 1, 10) if labelled else None
    arguments = (teacher, students, target if labelled else None, weight, 2.0, 0.1, -100, 0.5, *needs)
    torch.library.opcheck(torch.ops.fastslim.sandwich_loss.default, arguments)


def test_compiled_code_traces_the_op():
    logits, target = batch(4, 11)
    compiled = torch.compile(sandwich_loss, backend="aot_eager", fullgraph=True)
    for mine, truth in zip(
        losses_and_grads(compiled, logits, target), losses_and_grads(sandwich_loss, logits, target), strict=True
    ):
        assert torch.equal(mine, truth)


@pytest.mark.parametrize(("wrong", "position"), [(10, 2), (-1, 0), (1 << 40, 3)])
def test_a_target_that_is_no_class_names_the_range(wrong, position):
    logits, target = batch(4, 10)
    target[position] = wrong
    with pytest.raises(errors.FastslimValueError, match=rf"target {wrong} is not a class: targets are in \[0, 10\)"):
        sandwich_loss(logits[0], logits[1:], target)
    with pytest.raises(errors.FastslimValueError, match="1 of 4 are outside"):
        sandwich_loss(logits[0].requires_grad_(), logits[1:], target)


def test_raw_op_refuses_what_would_read_out_of_bounds():
    (teacher, student), target = batch(4, 10, students=1)
    op = torch.ops.fastslim.sandwich_loss
    numbers = (2.0, 0.1, -100, 0.5, True, True)
    with pytest.raises(RuntimeError, match="teacher's shape"):
        op(teacher, [student[:3]], target, None, *numbers)
    with pytest.raises(RuntimeError, match="contiguous"):
        op(teacher.t(), [], target, None, *numbers)
    with pytest.raises(RuntimeError, match="int64"):
        op(teacher, [], target.int(), None, *numbers)
    with pytest.raises(RuntimeError, match=r"target is a contiguous int64 \(rows,\)"):
        op(teacher, [], target[:2], None, *numbers)
    with pytest.raises(RuntimeError, match="class_weight"):
        op(teacher, [], target, torch.ones(9), *numbers)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float64"):
        op(teacher.half(), [], target, None, *numbers)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher": torch.ones(4, 10, dtype=torch.long)}, TypeError, "teacher logits are torch.int64"),
        ({"teacher": torch.ones(10)}, ValueError, r"expected \(N, C, \.\.\.\)"),
        ({"students": [torch.ones(4, 9)]}, ValueError, r"student 0 logits have shape \(4, 9\)"),
        ({"target": torch.zeros(3, dtype=torch.long)}, ValueError, r"target has shape \(3,\), expected \(4,\)"),
        ({"target": torch.zeros(4, 9)}, ValueError, r"expected \(4, 10\) for torch.float32 targets"),
        ({"target": torch.zeros(4, dtype=torch.bool)}, TypeError, "class indices"),
        ({"tau": 0.0}, ValueError, "tau=0.0 must be a positive"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing=1.5 must lie in \[0, 1\]"),
        ({"class_weight": torch.ones(10, device="meta")}, ValueError, "class_weight is on meta, the logits are on cpu"),
        ({"class_weight": torch.ones(3)}, ValueError, r"class_weight has shape \(3,\), expected \(10,\)"),
    ],
)
def test_bad_arguments_name_the_fix(change, error, message):
    (teacher, student), target = batch(4, 10, students=1)
    arguments = {"teacher": teacher, "students": [student], "target": target} | change
    with pytest.raises(error, match=message) as raised:
        sandwich_loss(**arguments)
    assert isinstance(raised.value, errors.FastslimError)


def test_an_unknown_reduction_is_answered_with_the_nearest():
    with pytest.raises(errors.FastslimValueError, match="did you mean 'batchmean'"):
        kl_div_loss(torch.ones(2, 3), torch.ones(2, 3), reduction="batch_mean")
