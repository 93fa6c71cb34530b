"""Distillation losses: modules called with the student's and the teacher's records."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastslim import errors
from fastslim.ops import kl_div_loss
from fastslim.registry import MODELS


def _one_of(name: str, value: object, known: tuple[str | None, ...]) -> None:
    if value not in known:
        raise errors.FastslimValueError(f"{name}={value!r}: {errors.nearest(str(value), map(str, known))}")


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
        _one_of("reduction", reduction, ("batchmean", "sum", "mean", "none", None))
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
        reduction: ``"mean"`` (over the samples), ``"sum"`` or ``"none"`` (one loss per sample).
        mult_tem_square: multiply by ``tau^2``, which keeps the gradient's size independent of tau.
        loss_weight: factor.

    Raises:
        FastslimValueError: an unknown reduction.
    """

    def __init__(
        self, tau: float = 1.0, reduction: str = "mean", mult_tem_square: bool = True, loss_weight: float = 1.0
    ) -> None:
        super().__init__()
        _one_of("reduction", reduction, ("mean", "sum", "none"))
        self.tau, self.reduction, self.loss_weight = tau, reduction, loss_weight
        self.mult_tem_square = mult_tem_square

    def forward(
        self, preds_S: Tensor, preds_T: Tensor, weight: Tensor | None = None, avg_factor: float | None = None
    ) -> Tensor:
        """The loss of logits ``(N, C)``.

        Args:
            preds_S: the student's.
            preds_T: the teacher's; detached.
            weight: a factor per sample ``(N,)``.
            avg_factor: what ``"mean"`` divides the sum by, instead of the number of samples.
        """
        labels = F.softmax(_at_least_float32(preds_T.detach()) / self.tau, dim=1)
        loss = -(labels * F.log_softmax(_at_least_float32(preds_S) / self.tau, dim=1)).sum(1)
        if weight is not None:
            loss = loss * weight
        if self.reduction == "mean":
            loss = loss.mean() if avg_factor is None else loss.sum() / avg_factor
        elif self.reduction == "sum":
            loss = loss.sum()
        return loss * (self.loss_weight * (self.tau**2 if self.mult_tem_square else 1.0))


@MODELS.register_module()
class L1Loss(nn.Module):
    """``loss_weight * |student - teacher|`` of features.

    Args:
        loss_weight: factor.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        FastslimValueError: an unknown reduction.
    """

    def __init__(self, loss_weight: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        _one_of("reduction", reduction, ("mean", "sum", "none"))
        self.loss_weight, self.reduction = loss_weight, reduction

    def forward(self, s_feature: Tensor, t_feature: Tensor) -> Tensor:
        """The loss of features of one shape."""
        _check_same_shape(s_feature, t_feature)
        return self.loss_weight * F.l1_loss(s_feature, t_feature, reduction=self.reduction)


@MODELS.register_module()
class L2Loss(nn.Module):
    """Squared (or Euclidean) distance of features.

    Args:
        normalize: give every sample's feature the length 1 first.
        loss_weight: factor.
        mult: another factor, as MMRazor has it.
        div_element: divide the sum by the number of elements instead of the number of samples.
        dist: take the square root, the distance itself.
    """

    def __init__(
        self,
        normalize: bool = True,
        loss_weight: float = 1.0,
        mult: float = 1.0,
        div_element: bool = False,
        dist: bool = False,
    ) -> None:
        super().__init__()
        self.normalize, self.loss_weight, self.mult = normalize, loss_weight, mult
        self.div_element, self.dist = div_element, dist

    def forward(self, s_feature: Tensor, t_feature: Tensor) -> Tensor:
        """The loss of features ``(N, ...)`` of one shape."""
        _check_same_shape(s_feature, t_feature)
        student, teacher = s_feature.flatten(1), t_feature.flatten(1)
        if self.normalize:
            student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
        loss = torch.sum((student - teacher) ** 2)
        if self.dist:
            loss = loss.sqrt()
        count = student.numel() if self.div_element else student.shape[0]
        return self.loss_weight * self.mult * loss / count


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise errors.FastslimValueError(
            f"the student's feature has shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: "
            "a connector can bring them together"
        )
