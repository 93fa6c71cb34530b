"""sandwich_loss and kl_div_loss against F.cross_entropy and F.kl_div in float64, and what they refuse."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from fastslim import errors
from fastslim.ops import backend, kl_div_loss, sandwich_loss
from fastslim.ops.sandwich_loss import kl_div_loss_reference, sandwich_loss_reference

DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float64, id="float64"),
]
# (N, C): the smallest, one vector and its neighbours, a block of 1024 and its neighbour, ImageNet, no row at all.
SHAPES = [(1, 2), (3, 15), (2, 16), (5, 17), (7, 63), (4, 1000), (2, 1024), (3, 1025), (0, 10)]
OPTIONS = {
    "plain": {},
    "tau": {"tau": 4.0},
    "smoothing": {"label_smoothing": 0.1},
    "weight": {"class_weight": True},
    "smoothing-weight-tau": {"label_smoothing": 0.3, "class_weight": True, "tau": 0.5},
    "ignore": {"ignore_index": 1},
}


@pytest.fixture(autouse=True)
def nan_poisoned_buffers():
    """torch.empty comes filled with NaN: whatever is not written is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def batch(n, c, *positions, dtype=torch.float32, students=2, seed=0, scale=3.0):
    """Teacher, students and targets of one shape."""
    random = torch.Generator().manual_seed(seed)
    logits = [torch.randn(n, c, *positions, generator=random) * scale for _ in range(1 + students)]
    target = torch.randint(0, c, (n, *positions), generator=random)
    return [x.to(dtype) for x in logits], target


def with_weight(options, classes):
    if not options.get("class_weight"):
        return options
    return options | {"class_weight": torch.linspace(0.2, 2.0, classes, dtype=torch.float64)}


def losses_and_grads(function, logits, *args, **kwargs):
    leaves = [x.detach().clone().requires_grad_() for x in logits]
    losses = function(leaves[0], leaves[1:], *args, **kwargs)
    losses.sum().backward()
    return [losses.detach(), *(x.grad for x in leaves)]


def torch_losses(teacher, students, target, *, tau=1.0, label_smoothing=0.0, class_weight=None, ignore_index=-100):
    """What a user would write with torch alone, in the logits' own dtype."""
    weight = None if class_weight is None else class_weight.to(teacher.dtype)
    losses = [F.cross_entropy(teacher, target, weight, ignore_index=ignore_index, label_smoothing=label_smoothing)]
    soft = F.softmax(teacher.detach() / tau, dim=1)
    losses += [tau**2 * F.kl_div(F.log_softmax(s / tau, 1), soft, reduction="batchmean") for s in students]
    return torch.stack(losses)


def assert_all_as_exact_as_torch(ours, theirs, exact):
    """Err(ours) <= 2 err(torch), and a rounding of the probabilities that a gradient is the difference of."""
    tiny = 1e-13 if ours[0].dtype == torch.float64 else 2.0**-23
    for mine, torchs, truth in zip(ours, theirs, exact, strict=True):
        assert mine.shape == truth.shape
        assert torch.equal(mine.isnan(), truth.isnan())
        if not truth.numel() or truth.isnan().all():
            continue
        allowed = 2 * (torchs.double() - truth).abs().max() + tiny * max(1 / len(truth), truth.abs().max())
        error = (mine.double() - truth).abs().max()
        assert error <= allowed, f"error {error:.3g}, torch's own {allowed / 2:.3g}"


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
