"""The losses of logits against their formulas in plain torch."""

import pytest
import torch
from torch.nn import functional as F

from fastslim import errors
from fastslim.distillers import WSLD, CrossEntropyLoss, DISTLoss, DKDLoss, KDSoftCELoss, KLDivergence
from fastslim.registry import MODELS


@pytest.fixture
def logits():
    random = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 11, generator=random, dtype=torch.float64) for _ in "ST")
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none", None])
@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
def test_kl_divergence_is_scaled_by_weight_and_temperature(logits, reduction):
    student, teacher = logits
    loss = KLDivergence(tau=3.0, reduction=reduction, loss_weight=0.5)(student, teacher)
    truth = 0.5 * 9 * F.kl_div(F.log_softmax(student / 3, 1), F.softmax(teacher / 3, 1), reduction=reduction or "none")
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), student)[0] for x in (loss, truth)))


@pytest.mark.parametrize("detach", [True, False])
def test_kl_divergence_reaches_the_teacher_only_if_told_to(logits, detach):
    student, teacher = logits
    KLDivergence(teacher_detach=detach)(student, teacher.requires_grad_()).backward()
    assert (teacher.grad is None) == detach
    assert student.grad is not None


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_soft_cross_entropy_is_torchs_and_has_the_gradient_of_kl(logits, tau):
    student, teacher = logits
    loss = KDSoftCELoss(tau=tau)(student, teacher)
    torch.testing.assert_close(loss, tau**2 * F.cross_entropy(student / tau, F.softmax(teacher / tau, 1)))
    gradients = [torch.autograd.grad(x, student)[0] for x in (loss, KLDivergence(tau=tau)(student, teacher))]
    torch.testing.assert_close(*gradients)


def test_soft_cross_entropy_options(logits):
    student, teacher = logits
    weight = torch.linspace(0, 1, 6, dtype=torch.float64)
    each = KDSoftCELoss(tau=2.0, reduction="none")(student, teacher)
    torch.testing.assert_close(KDSoftCELoss(tau=2.0, reduction="sum")(student, teacher), each.sum())
    torch.testing.assert_close(
        KDSoftCELoss(tau=2.0, mult_tem_square=False, loss_weight=3.0)(student, teacher), 3 * each.mean() / 4
    )
    torch.testing.assert_close(
        KDSoftCELoss(tau=2.0)(student, teacher, weight=weight, avg_factor=2.0), (each * weight).sum() / 2
    )


def test_soft_cross_entropy_takes_a_reduction_for_one_call(logits):
    loss = KDSoftCELoss(reduction=None)
    torch.testing.assert_close(loss(*logits, reduction_override="sum"), loss(*logits).sum())
    with pytest.raises(errors.FastslimValueError, match="did you mean 'sum'"):
        loss(*logits, reduction_override="summ")


def test_the_teachers_class_is_a_label(logits):
    student, teacher = logits
    loss = CrossEntropyLoss(loss_weight=2.0)(student, teacher)
    rows = [-2 * torch.log_softmax(s, 0)[int(t.argmax())] for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(loss, torch.stack(rows).mean())


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
def test_decoupled_distillation_splits_the_label_from_the_others(logits, reduction):
    student, teacher = logits
    labels, tau = torch.tensor([0, 10, 3, 3, 7, 1]), 2.0
    of_label, of_others = [], []
    for s, t, label in zip((student / tau).softmax(1), (teacher / tau).softmax(1), labels, strict=True):
        others = [c for c in range(11) if c != label]
        p, q = (torch.stack((x[label], x[others].sum())) for x in (t, s))
        of_label.append(p * (p / q).log())
        p, q = (x[others] / x[others].sum() for x in (t, s))
        of_others.append(p * (p / q).log())
    parts = [torch.stack(of_label), torch.stack(of_others)]
    if reduction == "none":
        parts = [part.sum(1) for part in parts]
    elif reduction == "mean":
        parts = [part.mean() for part in parts]
    else:
        parts = [part.sum() / (6 if reduction == "batchmean" else 1) for part in parts]
    truth = 0.5 * tau**2 * (2.0 * parts[0] + 8.0 * parts[1])
    loss = DKDLoss(tau, alpha=2.0, beta=8.0, reduction=reduction, loss_weight=0.5)(student, teacher, labels)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (loss, truth)))


def test_decoupled_distillation_adds_up_to_kl(logits):
    """KL = KL of the label + (1 - p_label) KL of the others: with one class beside the label they are the same."""
    student, teacher = (x[:, :2] for x in logits)
    labels = torch.tensor([0, 1, 0, 1, 1, 1])
    torch.testing.assert_close(DKDLoss()(student, teacher, labels), KLDivergence()(student, teacher))
    huge = 1e4 * torch.eye(6, 11, dtype=torch.float64)
    assert torch.isfinite(DKDLoss()(huge, -huge, torch.arange(6)))


def test_dist_loss_correlates_samples_and_classes(logits):
    student, teacher = logits
    p_s, p_t = ((x / 3).softmax(1) for x in logits)
    r = [torch.corrcoef(torch.stack((a, b)))[0, 1] for a, b in zip(p_s, p_t, strict=True)]
    r_class = [torch.corrcoef(torch.stack((a, b)))[0, 1] for a, b in zip(p_s.t(), p_t.t(), strict=True)]
    truth = 0.5 * 9 * (2 * (1 - sum(r) / 6) + 4 * (1 - sum(r_class) / 11))
    loss = DISTLoss(inter_loss_weight=2.0, intra_loss_weight=4.0, tau=3.0, loss_weight=0.5)(student, teacher)
    torch.testing.assert_close(loss, truth, rtol=1e-4, atol=0)  # 1e-8 guards the denominators
    assert DISTLoss()(teacher, teacher) < 1e-4 < loss


def test_weighted_soft_labels_weigh_each_sample(logits):
    student, teacher = logits
    labels, rows = torch.tensor([0, 10, 3, 3, 7, 1]), []
    for s, t, label in zip(student, teacher, labels, strict=True):
        soft = -((t / 2).softmax(0) * (s / 2).log_softmax(0)).sum()
        ratio = (s.log_softmax(0)[label] / (t.log_softmax(0)[label] - 1e-7)).detach()
        rows.append((1 - torch.exp(-ratio)) * soft)
    truth = 0.5 * 4 * torch.stack(rows).mean()
    loss = WSLD(tau=2.0, loss_weight=0.5, num_classes=11)(student, teacher, labels)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(*(torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, truth)))


@pytest.mark.parametrize("loss", [DKDLoss(), WSLD(num_classes=11)], ids=["DKDLoss", "WSLD"])
def test_labels_must_be_class_numbers(logits, loss):
    with pytest.raises(errors.FastslimValueError, match="6 class numbers, one for each sample, but got torch.float64"):
        loss(*logits, torch.zeros(6, dtype=torch.float64))
    with pytest.raises(errors.FastslimValueError, match=r"of shape \(3,\)"):
        loss(*logits, torch.zeros(3, dtype=torch.long))
    with pytest.raises(errors.FastslimValueError, match=r"should be \(N, C\) of one shape.* \(6, 7\)"):
        loss(logits[0], logits[1][:, :7], torch.zeros(6, dtype=torch.long))
    if isinstance(loss, WSLD):
        with pytest.raises(errors.FastslimValueError, match="choose num_classes=11 instead of 1000"):
            WSLD()(*logits, torch.zeros(6, dtype=torch.long))


@pytest.mark.parametrize("name", ["KLDivergence", "KDSoftCELoss", "L1Loss", "DKDLoss", "AdaptiveLossSoft"])
def test_an_unknown_reduction_is_refused(name):
    with pytest.raises(errors.FastslimValueError, match="did you mean") as raised:
        MODELS.build({"type": name, "reduction": "means"})
    assert isinstance(raised.value, AssertionError)  # what MMRazor's losses raise
