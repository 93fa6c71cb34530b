"""Losses between the logits of a student and of its teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastslim.contract_errors import AssertedValueError
from fastslim.distillers.loss_checks import (
    REDUCTIONS,
    at_least_float32,
    check_labels,
    check_logits,
    check_one_of,
    reduced,
)
from fastslim.ops import kl_div_loss
from fastslim.registry import MODELS


@MODELS.register_module()
class KLDivergence(nn.Module):
    """``loss_weight * tau^2 * KL(teacher || student)`` (Hinton et al. 2015, arXiv:1503.02531); the fused kernel.

    Args:
        tau: temperature that softens both predictions.
        reduction: ``"batchmean"``, ``"sum"``, ``"mean"``, or ``"none"`` (also None).
        loss_weight: factor.
        teacher_detach: let no gradient flow to the teacher. A distiller's teacher records have none anyway.

    Raises:
        FastslimValueError: an unknown reduction.
    """

    def __init__(
        self,
        tau: float = 1.0,
        reduction: str | None = "batchmean",
        loss_weight: float = 1.0,
        teacher_detach: bool = True,
    ) -> None:
        super().__init__()
        check_one_of("reduction", reduction, (*REDUCTIONS, None))
        self.tau, self.loss_weight, self.teacher_detach = tau, loss_weight, teacher_detach
        self.reduction = reduction or "none"

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        """The loss of logits ``(N, C, ...)``."""
        teacher = preds_T.detach() if self.teacher_detach else preds_T
        loss = kl_div_loss(preds_S, teacher, tau=self.tau, reduction=self.reduction)
        return loss if self.loss_weight == 1.0 else self.loss_weight * loss


@MODELS.register_module()
class KDSoftCELoss(nn.Module):
    """Cross-entropy of the student with the teacher's softened prediction as its label.

    ``loss_weight * tau^2 * mean_n(-sum_c softmax(T / tau)_c log_softmax(S / tau)_c)``: KL plus the teacher's own
    entropy, so its gradient is that of :class:`KLDivergence`.

    Args:
        tau: temperature.
        reduction: ``"mean"`` (over the samples), ``"sum"`` or ``"none"`` (one loss per sample; also None).
        mult_tem_square: multiply by ``tau^2``, which keeps the gradient's size independent of tau.
        loss_weight: factor.

    Raises:
        FastslimValueError: an unknown reduction.
    """

    def __init__(
        self, tau: float = 1.0, reduction: str | None = "mean", mult_tem_square: bool = True, loss_weight: float = 1.0
    ) -> None:
        super().__init__()
        check_one_of("reduction", reduction, ("mean", "sum", "none", None))
        self.tau, self.reduction, self.loss_weight = tau, reduction or "none", loss_weight
        self.mult_tem_square = mult_tem_square

    def forward(
        self,
        preds_S: Tensor,
        preds_T: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """The loss of logits ``(N, C)``.

        Args:
            preds_S: the student's.
            preds_T: the teacher's; detached.
            weight: a factor per sample ``(N,)``.
            avg_factor: what ``"mean"`` divides the sum by, instead of the number of samples.
            reduction_override: a reduction for this call.
        """
        check_one_of("reduction_override", reduction_override, ("mean", "sum", "none", None))
        labels = F.softmax(at_least_float32(preds_T.detach()) / self.tau, dim=1)
        loss = -(labels * F.log_softmax(at_least_float32(preds_S) / self.tau, dim=1)).sum(1)
        if weight is not None:
            loss = loss * weight
        reduction = reduction_override or self.reduction
        loss = loss.sum() / avg_factor if reduction == "mean" and avg_factor is not None else reduced(loss, reduction)
        return loss * (self.loss_weight * (self.tau**2 if self.mult_tem_square else 1.0))


@MODELS.register_module()
class CrossEntropyLoss(nn.Module):
    """Cross-entropy of the student with the teacher's most likely class as its label.

    Args:
        loss_weight: factor.
    """

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        """The loss of logits ``(N, C, ...)``."""
        return self.loss_weight * F.cross_entropy(at_least_float32(preds_S), preds_T.detach().argmax(dim=1))


@MODELS.register_module()
class DKDLoss(nn.Module):
    """Decoupled knowledge distillation (Zhao et al., CVPR 2022, arXiv:2203.08679).

    The KL divergence splits into that of ``(p_label, 1 - p_label)`` and that of the other classes among themselves;
    here each has a weight of its own: ``loss_weight * tau^2 * (alpha * KL_label + beta * KL_others)``.

    Args:
        tau: temperature.
        alpha: weight of the label's part.
        beta: weight of the others' part.
        reduction: of both parts, ``"batchmean"``, ``"sum"``, ``"mean"`` or ``"none"`` (one loss per sample).
        loss_weight: factor.

    Raises:
        FastslimValueError: an unknown reduction.
    """

    def __init__(
        self,
        tau: float = 1.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        reduction: str = "batchmean",
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_one_of("reduction", reduction, REDUCTIONS)
        self.tau, self.alpha, self.beta = tau, alpha, beta
        self.reduction, self.loss_weight = reduction, loss_weight

    def forward(self, preds_S: Tensor, preds_T: Tensor, gt_labels: Tensor) -> Tensor:
        """The loss of logits ``(N, C)`` and class numbers ``(N,)``; the teacher is detached."""
        check_logits(preds_S, preds_T)
        labels = check_labels(gt_labels, preds_S)
        student, teacher = at_least_float32(preds_S) / self.tau, at_least_float32(preds_T.detach()) / self.tau
        other = torch.ones_like(student, dtype=torch.bool).scatter_(1, labels[:, None], False)
        of_label = self._kl(*(_log_label_and_rest(x, labels, other) for x in (student, teacher)))
        of_others = self._kl(*(_others(x, other).log_softmax(1) for x in (student, teacher)))
        return self.loss_weight * self.tau**2 * (self.alpha * of_label + self.beta * of_others)

    def _kl(self, student: Tensor, teacher: Tensor) -> Tensor:
        divergence = teacher.exp() * (teacher - student)
        return reduced(divergence.sum(1) if self.reduction == "none" else divergence, self.reduction)


def _others(logits: Tensor, other: Tensor) -> Tensor:
    return logits[other].view(len(logits), -1)


def _log_label_and_rest(logits: Tensor, labels: Tensor, other: Tensor) -> Tensor:
    """Logarithms of the label's probability and of all others' together, ``(N, 2)``."""
    log_p = logits.log_softmax(1)
    return torch.stack((log_p.gather(1, labels[:, None])[:, 0], _others(log_p, other).logsumexp(1)), 1)


@MODELS.register_module()
class DISTLoss(nn.Module):
    """Distillation from a stronger teacher (Huang et al., NeurIPS 2022, arXiv:2205.10536).

    ``tau^2 * (inter * (1 - mean_n r(S_n, T_n)) + intra * (1 - mean_c r(S_c, T_c)))``: Pearson's correlation of the
    predictions of one sample, and of one class over the batch.

    Args:
        inter_loss_weight: weight of the samples' part.
        intra_loss_weight: weight of the classes' part.
        tau: temperature.
        loss_weight: factor.
        teacher_detach: let no gradient flow to the teacher.
    """

    def __init__(
        self,
        inter_loss_weight: float = 1.0,
        intra_loss_weight: float = 1.0,
        tau: float = 1.0,
        loss_weight: float = 1.0,
        teacher_detach: bool = True,
    ) -> None:
        super().__init__()
        self.inter_loss_weight, self.intra_loss_weight = inter_loss_weight, intra_loss_weight
        self.tau, self.loss_weight, self.teacher_detach = tau, loss_weight, teacher_detach

    def forward(self, logits_S: Tensor, logits_T: Tensor) -> Tensor:
        """The loss of logits ``(N, C)``."""
        check_logits(logits_S, logits_T)
        teacher = logits_T.detach() if self.teacher_detach else logits_T
        p_s, p_t = ((at_least_float32(x) / self.tau).softmax(1) for x in (logits_S, teacher))
        inter, intra = _unrelated(p_s, p_t), _unrelated(p_s.t(), p_t.t())
        return self.loss_weight * self.tau**2 * (self.inter_loss_weight * inter + self.intra_loss_weight * intra)


def _unrelated(a: Tensor, b: Tensor) -> Tensor:
    """One minus the mean over the rows of Pearson's correlation."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()


@MODELS.register_module()
class WSLD(nn.Module):
    """Weighted soft labels (Zhou et al., ICLR 2021, arXiv:2102.00650).

    The soft cross-entropy of every sample is multiplied by ``1 - exp(-ce_S / ce_T)``, the ratio of the student's and
    the teacher's cross-entropy with the true label: little where the student is right already.

    Args:
        tau: temperature.
        loss_weight: factor.
        num_classes: of the labels.
    """

    def __init__(self, tau: float = 1.0, loss_weight: float = 1.0, num_classes: int = 1000) -> None:
        super().__init__()
        self.tau, self.loss_weight, self.num_classes = tau, loss_weight, num_classes

    def forward(self, student: Tensor, teacher: Tensor, gt_labels: Tensor) -> Tensor:
        """The loss of logits ``(N, num_classes)`` and class numbers ``(N,)``; the teacher is detached."""
        check_logits(student, teacher)
        if student.shape[1] != self.num_classes:
            raise AssertedValueError(
                f"the logits are of {student.shape[1]} classes: choose num_classes={student.shape[1]} instead of "
                f"{self.num_classes}"
            )
        labels, teacher = check_labels(gt_labels, student), at_least_float32(teacher.detach())
        student = at_least_float32(student)
        soft = -((teacher / self.tau).softmax(1) * (student / self.tau).log_softmax(1)).sum(1)
        ce_s, ce_t = (F.cross_entropy(x.detach(), labels, reduction="none") for x in (student, teacher))
        return self.loss_weight * self.tau**2 * (-torch.expm1(-ce_s / (ce_t + 1e-7)) * soft).mean()
