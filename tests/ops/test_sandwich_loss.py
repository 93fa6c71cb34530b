"""sandwich_loss and kl_div_loss against F.cross_entropy and F.kl_div in float64."""

import os
import subprocess
import sys

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
from torch.nn import functional as F

from fastslim.ops import kl_div_loss, sandwich_loss
from fastslim.ops.sandwich_loss import kl_div_loss_reference, sandwich_loss_reference

DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float64, id="float64"),
]
# (N, C): the smallest, one vector and its neighbours, a block of 1024 and its neighbour, ImageNet, no row at all.
SHAPES = [(1, 2), (3, 15), (2, 16), (5, 17), (7, 63), (4, 1000), (2, 1024), (3, 1025), (0, 10)]


@pytest.fixture(autouse=True)
def nan_poisoned_buffers():
    """torch.empty comes filled with NaN: whatever is not written is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_gradients_are_as_exact_as_torchs(dtype, shape, options):
    logits, target = batch(*shape, dtype=dtype)
    options = with_weight(options, shape[1])
    ours = losses_and_grads(sandwich_loss, logits, target, **options)
    theirs = losses_and_grads(torch_losses, logits, target, **options)
    exact = losses_and_grads(torch_losses, [x.double() for x in logits], target, **options)
    assert [x.dtype for x in ours[1:]] == [dtype] * 3
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_all_as_exact_as_torch(ours, theirs, exact)


@pytest.mark.parametrize("classes", [2, 63, 200_000])
def test_a_row_may_have_any_number_of_classes(classes):
    logits, target = batch(4, classes, students=1)
    ours = losses_and_grads(sandwich_loss, logits, target, tau=2.0)
    theirs = losses_and_grads(torch_losses, logits, target, tau=2.0)
    exact = losses_and_grads(torch_losses, [x.double() for x in logits], target, tau=2.0)
    assert_all_as_exact_as_torch(ours, theirs, exact)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_classes_of_an_image_lie_in_dimension_one(layout):
    logits, target = batch(2, 21, 5, 3)
    if layout == "channels_last":
        logits = [x.to(memory_format=torch.channels_last) for x in logits]
    elif layout == "transposed":
        logits = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in logits]
    ours = losses_and_grads(sandwich_loss, logits, target)
    theirs = losses_and_grads(torch_losses, logits, target)
    exact = losses_and_grads(torch_losses, [x.double() for x in logits], target)
    assert_all_as_exact_as_torch(ours, theirs, exact)


def test_rows_of_a_wider_tensor_are_read_through_their_strides():
    logits, target = batch(6, 40)
    cut = [x[:, 7:30] for x in logits]
    target = target % 23
    for mine, truth in zip(
        losses_and_grads(sandwich_loss, cut, target), losses_and_grads(torch_losses, cut, target), strict=True
    ):
        torch.testing.assert_close(mine, truth)


def test_exponential_is_exact_to_two_units_in_the_last_place():
    # The gradient of a class that is not the target is its probability / N, here exp(x) / (2 + exp(x)).
    x = torch.linspace(-75, 0, 20_001)  # below, the probability / N is no normal number
    teacher = torch.stack([torch.zeros_like(x), x, torch.zeros_like(x)], dim=1).requires_grad_()
    sandwich_loss(teacher, [], torch.zeros(len(x), dtype=torch.long)).backward()
    truth = x.double().exp() / (2 + x.double().exp()) / len(x)
    error = ((teacher.grad[:, 1].double() - truth) / truth).abs().max().item()
    # Two units for exp, half a unit each for the scale and the product.
    assert error <= 3 * 2.0**-23


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_extreme_logits_stay_finite_and_right(dtype, tau):
    logits, target = batch(9, 37, dtype=dtype, scale=1e4)
    ours = losses_and_grads(sandwich_loss, logits, target, tau=tau)
    exact = losses_and_grads(torch_losses, [x.double() for x in logits], target, tau=tau)
    theirs = losses_and_grads(torch_losses, logits, target, tau=tau)
    assert all(x.isfinite().all() for x in ours)
    assert_all_as_exact_as_torch(ours, theirs, exact)


def test_masked_classes_have_no_gradient_and_no_loss():
    (teacher, student), _ = batch(3, 20, students=1)
    teacher[:, 5:9] = student[:, 5:9] = -torch.inf
    ours = losses_and_grads(sandwich_loss, [teacher, student], torch.tensor([0, 1, 2]))
    kept = [torch.cat([x[:, :5], x[:, 9:]], dim=1) for x in (teacher, student)]
    exact = losses_and_grads(torch_losses, kept, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(ours[0], exact[0])
    assert (ours[1][:, 5:9] == 0).all() and (ours[2][:, 5:9] == 0).all()
    torch.testing.assert_close(torch.cat([ours[2][:, :5], ours[2][:, 9:]], 1), exact[2])


def test_a_class_only_the_student_excludes_costs_infinitely_much():
    (teacher, student), target = batch(2, 5, students=1)
    student[0, 3] = -torch.inf
    losses = sandwich_loss(teacher, [student], target)
    assert losses[1] == torch.inf
    assert torch.equal(losses[1], sandwich_loss_reference(teacher, [student], target)[1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 18])  # inside a vector and behind the last full one
def test_a_broken_logit_is_never_hidden(value, column):
    logits, target = batch(3, 19)
    logits[1][1, column] = value
    losses, teacher_grad, *grads = losses_and_grads(sandwich_loss, logits, target)
    assert losses.isnan().tolist() == [False, True, False]
    assert not teacher_grad.isnan().any() and not grads[1].isnan().any()
    assert grads[0].isnan().any(dim=1).tolist() == [False, True, False]


def test_all_targets_ignored_gives_nan_and_no_gradient_as_in_torch():
    logits, _ = batch(3, 7, students=1)
    target = torch.full((3,), -100)
    losses, teacher_grad, _ = losses_and_grads(sandwich_loss, logits, target)
    assert losses.isnan().tolist() == [True, False]
    assert (teacher_grad == 0).all()


def test_equal_logits_have_no_divergence():
    (teacher,), _ = batch(5, 1000, students=0)
    student = teacher.clone().requires_grad_()
    loss = kl_div_loss(student, teacher, tau=3.0)
    loss.backward()
    assert loss == 0 and (student.grad == 0).all()


def test_the_teacher_learns_from_the_labels_only():
    logits, target = batch(4, 10)
    leaves = [x.requires_grad_() for x in logits]
    sandwich_loss(leaves[0], leaves[1:], target)[1:].sum().backward()
    assert (leaves[0].grad == 0).all() and all((x.grad != 0).any() for x in leaves[1:])


def test_repeats_and_thread_counts_are_bitwise_equal():
    logits, target = batch(301, 97, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append(losses_and_grads(sandwich_loss, logits, target, tau=2.0, label_smoothing=0.1))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("shape", [(4, 33), (2, 5, 3, 2), (0, 5)], ids=str)
def test_kl_div_loss_equals_torchs(reduction, shape):
    (teacher, student), _ = batch(*shape, dtype=torch.float64, students=1)
    results = []
    for function in (kl_div_loss, kl_div_loss_reference, None):
        leaf = student.clone().requires_grad_()
        if function:
            loss = function(leaf, teacher, tau=2.5, reduction=reduction)
        else:
            loss = 2.5**2 * F.kl_div(F.log_softmax(leaf / 2.5, 1), F.softmax(teacher / 2.5, 1), reduction=reduction)
        (loss * 0.7).sum().backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[2], equal_nan=True)
    torch.testing.assert_close(results[1], results[2], equal_nan=True)


def test_kl_div_loss_teaches_the_teacher_unless_it_is_detached():
    (teacher, student), _ = batch(4, 9, dtype=torch.float64, students=1)
    assert torch.autograd.gradcheck(
        lambda t, s: kl_div_loss(s, t, tau=2.0), (teacher.requires_grad_(), student.requires_grad_())
    )
    kl_div_loss(student, teacher.detach()).backward()
    assert teacher.grad is None and student.grad is not None


def test_gradients_pass_gradcheck():
    logits, target = batch(3, 7, dtype=torch.float64)
    weight = torch.linspace(0.5, 2, 7, dtype=torch.float64)

    def function(teacher, *students):
        # The teacher is detached inside the KL: checked alone, where its value cannot move them.
        return sandwich_loss(teacher, students, target, tau=2.0, label_smoothing=0.2, class_weight=weight)

    leaves = [x.requires_grad_() for x in logits]
    assert torch.autograd.gradcheck(lambda teacher: function(teacher), leaves[:1])
    assert torch.autograd.gradcheck(lambda *students: function(leaves[0].detach(), *students), leaves[1:])


@pytest.mark.parametrize("soft", [False, True])
def test_reference_is_torch(soft):
    logits, target = batch(4, 9, dtype=torch.float64)
    if soft:
        target = F.softmax(torch.randn(4, 9, dtype=torch.float64), dim=1)
    options = {"label_smoothing": 0.1, "class_weight": torch.linspace(0.5, 2, 9, dtype=torch.float64), "tau": 3.0}
    ours = losses_and_grads(sandwich_loss_reference, logits, target, **options)
    for mine, truth in zip(ours, losses_and_grads(torch_losses, logits, target, **options), strict=True):
        torch.testing.assert_close(mine, truth)
    if soft:  # class probabilities take the same path
        for mine, truth in zip(losses_and_grads(sandwich_loss, logits, target, **options), ours, strict=True):
            assert torch.equal(mine, truth)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_older_instruction_sets_compute_the_same(isa):
    script = (
        "import torch; from fastslim import _ext, ops\n"
        "from fastslim.ops.sandwich_loss import sandwich_loss_reference\n"
        f"if _ext.BUILD['cpu_isa'] != '{isa}': raise SystemExit(0)\n"
        "for c in (2, 7, 9, 33, 1025):\n"
        "    t, s = (torch.randn(3, c).mul(5).requires_grad_() for _ in 'ts')\n"
        "    y = torch.randint(0, c, (3,))\n"
        "    grads = []\n"
        "    for f in (ops.sandwich_loss, sandwich_loss_reference):\n"
        "        grads.append(torch.autograd.grad(f(t, [s], y, tau=2.0).sum(), (t, s)))\n"
        "    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)\n"
    )
    environment = os.environ | {"FASTSLIM_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
