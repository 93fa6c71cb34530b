"""AlphaNet's loss against the definition of the divergences and against the authors' surrogate, in float64."""

import math

import pytest
import torch

from fastslim import errors
from fastslim.distillers import AdaptiveLossSoft, KLDivergence


@pytest.fixture
def logits():
    random = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(6, 11, generator=random, dtype=torch.float64) for _ in "ST")
    return student.requires_grad_(), teacher


def divergence(student, teacher, alpha):
    """D_alpha(p || q) as Minka (2005) defines it, class by class."""
    p, q = teacher.softmax(1), student.softmax(1)
    if alpha == 1:
        return (p * (p / q).log()).sum(1)
    if alpha == 0:
        return (q * (q / p).log()).sum(1)
    return ((p**alpha * q ** (1 - alpha)).sum(1) - 1) / (alpha * (alpha - 1))


@pytest.mark.parametrize("alpha", [-1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
def test_without_clipping_it_is_the_divergence_and_its_gradient(logits, alpha):
    student, teacher = logits
    loss = AdaptiveLossSoft(alpha, alpha, iw_clip=1e12)(student, teacher)
    truth = divergence(student, teacher, alpha).mean()
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, truth)))


def test_the_larger_divergence_of_each_sample_counts(logits):
    student, teacher = logits
    both = [divergence(student, teacher, alpha) for alpha in (0.0, 1.0)]
    assert (both[0] > both[1]).any() and (both[0] < both[1]).any()
    truth = torch.maximum(*both)
    loss = AdaptiveLossSoft(0.0, 1.0, iw_clip=1e12, reduction="none")(student, teacher)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), student)[0] for x in (loss, truth)))


def authors_surrogate(student, teacher, alpha, clip):
    """Loss and gradient loss of the reference code, whose weights are clipped: arXiv:2102.07954, equation 8."""
    q, p, log_q = student.softmax(1).detach(), teacher.softmax(1), student.log_softmax(1)
    ratio = p / q
    if alpha == 1:
        return (q * ratio * ratio.log()).sum(1), -(q * ratio * log_q).sum(1)
    if alpha == 0:
        ratio = ratio.clamp(0, clip)
        return -(q * ratio.log()).sum(1), -(q * (ratio.log() - 1) * log_q).sum(1)
    power = (ratio**alpha).clamp(0, clip)
    base = 1 / alpha / (alpha - 1)
    return (q * (power * base - base)).sum(1), -(q * (power / alpha + base) * log_q).sum(1)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-1.0, 2.0), (0.0, 0.5)])
def test_clipped_it_has_the_gradient_of_the_authors_code(logits, low, high):
    student, teacher = logits
    left, by_left = authors_surrogate(student, teacher, low, 5.0)
    right, by_right = authors_surrogate(student, teacher, high, 5.0)
    gradient = torch.autograd.grad(torch.where(left > right, by_left, by_right).mean(), student)[0]
    unclipped = torch.autograd.grad(AdaptiveLossSoft(low, high, iw_clip=1e12)(student, teacher), student)[0]
    loss = AdaptiveLossSoft(low, high)(student, teacher)
    torch.testing.assert_close(loss, torch.maximum(left, right).mean())
    ours = torch.autograd.grad(loss, student)[0]
    torch.testing.assert_close(ours, gradient)
    assert (ours - unclipped).abs().max() > 1e-3  # the clip was in effect


def test_at_alpha_one_it_is_kl(logits):
    torch.testing.assert_close(AdaptiveLossSoft(1.0, 1.0)(*logits), KLDivergence()(*logits))
    torch.testing.assert_close(AdaptiveLossSoft()(*logits, alpha_min=1.0, alpha_max=1.0), KLDivergence()(*logits))


def test_reductions_weight_and_teacher(logits):
    student, teacher = logits
    each = AdaptiveLossSoft(reduction="none")(student, teacher.requires_grad_())
    torch.testing.assert_close(AdaptiveLossSoft(reduction="sum", loss_weight=3.0)(student, teacher), 3 * each.sum())
    torch.testing.assert_close(AdaptiveLossSoft()(student, teacher), each.mean())
    each.sum().backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_far_apart_stay_finite(dtype):
    student = torch.tensor([[200.0, -200.0, 0.0], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = AdaptiveLossSoft()(student, -student.detach())
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(student.grad).all()


def test_half_precision_is_summed_in_fp32(logits):
    rounded = [x.detach().bfloat16() for x in logits]
    truth = AdaptiveLossSoft()(*(x.double() for x in rounded))
    torch.testing.assert_close(AdaptiveLossSoft()(*rounded).double(), truth, rtol=1e-5, atol=1e-6)


def test_it_refuses_what_cannot_work():
    with pytest.raises(errors.FastslimValueError, match="iw_clip=0 should be positive"):
        AdaptiveLossSoft(iw_clip=0)
    with pytest.raises(errors.FastslimValueError, match=r"\(N, C\) of one shape.* \(2, 3\) and \(2, 4\)"):
        AdaptiveLossSoft()(torch.zeros(2, 3), torch.zeros(2, 4))
    assert math.isclose(float(AdaptiveLossSoft()(torch.zeros(2, 3), torch.zeros(2, 3))), 0.0)
