"""The distillation losses against their formulas in plain torch."""

import pytest
import torch
from torch.nn import functional as F

from fastslim import errors
from fastslim.distillers import KDSoftCELoss, KLDivergence, L1Loss, L2Loss
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


def test_l1_loss(logits):
    student, teacher = logits
    torch.testing.assert_close(L1Loss(loss_weight=2.0)(student, teacher), 2 * (student - teacher).abs().mean())


@pytest.mark.parametrize("normalize", [True, False])
def test_l2_loss(logits, normalize):
    student, teacher = (x.view(6, 11, 1, 1) for x in logits)
    a, b = (x / x.norm(dim=1, keepdim=True) if normalize else x for x in logits)
    square = ((a - b) ** 2).sum()
    torch.testing.assert_close(L2Loss(normalize=normalize)(student, teacher), square / 6)
    torch.testing.assert_close(
        L2Loss(normalize=normalize, dist=True, mult=2.0)(student, teacher), 2 * square.sqrt() / 6
    )
    torch.testing.assert_close(L2Loss(normalize=normalize, div_element=True)(student, teacher), square / 66)


@pytest.mark.parametrize("loss", [L1Loss(), L2Loss()], ids=["L1Loss", "L2Loss"])
def test_features_of_different_width_name_the_connector(loss):
    with pytest.raises(errors.FastslimValueError, match="a connector can bring them together"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("name", ["KLDivergence", "KDSoftCELoss", "L1Loss"])
def test_an_unknown_reduction_is_refused(name):
    with pytest.raises(errors.FastslimValueError, match="did you mean"):
        MODELS.build({"type": name, "reduction": "means"})
