"""Losses between features of a student and of its teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastslim.distillers.loss_checks import (
    REDUCTIONS,
    at_least_float32,
    check_one_of,
    check_same_shape,
    reduced,
)
from fastslim.registry import MODELS


class FeatureLoss(nn.Module):
    """``loss_weight`` times what :meth:`forward_train` says of two features of one shape, in fp32 at least.

    Args:
        loss_weight: factor.
    """

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, s_feature: Tensor, t_feature: Tensor) -> Tensor:
        """The loss of the student's and the teacher's feature ``(N, C, ...)``."""
        self._check(s_feature, t_feature)
        return self.loss_weight * self.forward_train(at_least_float32(s_feature), at_least_float32(t_feature))

    def _check(self, student: Tensor, teacher: Tensor) -> None:
        check_same_shape(student, teacher)

    def forward_train(self, s_feature: Tensor, t_feature: Tensor) -> Tensor:
        """The loss without its weight."""
        raise NotImplementedError(f"{type(self).__name__} must say what it computes")


@MODELS.register_module()
class L1Loss(FeatureLoss):
    """``loss_weight * |student - teacher|`` of features.

    Args:
        loss_weight: factor.
        size_average: torch's old form: False is ``reduction="sum"``.
        reduce: torch's old form: False is ``reduction="none"``.
        reduction: ``"mean"``, ``"sum"``, ``"batchmean"`` or ``"none"``.

    Raises:
        FastslimValueError: an unknown reduction.
    """

    def __init__(
        self,
        loss_weight: float = 1.0,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(loss_weight)
        check_one_of("reduction", reduction, REDUCTIONS)
        if size_average is not None or reduce is not None:
            reduction = "none" if reduce is False else "sum" if size_average is False else "mean"
        self.reduction = reduction

    def forward_train(self, s_feature: Tensor, t_feature: Tensor) -> Tensor:
        """The distance without its weight."""
        return reduced((s_feature - t_feature).abs(), self.reduction)


@MODELS.register_module()
class L2Loss(FeatureLoss):
    """Squared distance of features, over the number of samples; or the distance itself.

    Args:
        loss_weight: factor.
        normalize: give every sample's feature the length `mult` first.
        mult: see `normalize`.
        div_element: divide by the number of elements instead of the number of samples.
        dist: take the distance: the square root of the whole sum, divided by nothing.
    """

    def __init__(
        self,
        loss_weight: float = 1.0,
        normalize: bool = True,
        mult: float = 1.0,
        div_element: bool = False,
        dist: bool = False,
    ) -> None:
        super().__init__(loss_weight)
        self.normalize, self.mult = normalize, mult
        self.div_element, self.dist = div_element, dist

    def forward_train(self, s_feature: Tensor, t_feature: Tensor) -> Tensor:
        """The distance without its weight."""
        student, teacher = s_feature.flatten(1), t_feature.flatten(1)
        if self.normalize:
            student, teacher = (self.mult * F.normalize(x, dim=1) for x in (student, teacher))
        if self.dist:
            return torch.linalg.vector_norm(student - teacher)
        square = torch.sum((student - teacher) ** 2)
        return square / (student.numel() if self.div_element else student.shape[0])


@MODELS.register_module()
class ATLoss(FeatureLoss):
    """Attention transfer (Zagoruyko & Komodakis, ICLR 2017, arXiv:1612.03928, equation 2 with p = 2).

    The attention of a feature is the mean over its channels of its square, normalised over the places of a sample;
    the loss is the mean square of the difference. Student and teacher may have different numbers of channels.

    Args:
        loss_weight: factor.
    """

    def _check(self, student: Tensor, teacher: Tensor) -> None:
        check_same_shape(student[:, :1], teacher[:, :1])

    def forward_train(self, s_feature: Tensor, t_feature: Tensor) -> Tensor:
        """The difference of both attentions, without its weight."""
        student, teacher = (self.calc_attention_matrix(x) for x in (s_feature, t_feature))
        return (student - teacher).square().mean()

    def calc_attention_matrix(self, x: Tensor) -> Tensor:
        """The attention ``(N, places)`` of a feature ``(N, C, ...)``."""
        return F.normalize(x.square().mean(1).reshape(len(x), -1))


@MODELS.register_module()
class FTLoss(FeatureLoss):
    """Factor transfer (Kim et al., NeurIPS 2018, arXiv:1802.04977): mean absolute difference of normalised factors.

    Args:
        loss_weight: factor.
    """

    def forward_train(self, s_feature: Tensor, t_feature: Tensor) -> Tensor:
        """The difference of both factors, without its weight."""
        return F.l1_loss(self.factor(s_feature), self.factor(t_feature))

    def factor(self, x: Tensor) -> Tensor:
        """Every sample's feature as a vector of length 1."""
        return F.normalize(x.flatten(1))


@MODELS.register_module()
class ABLoss(FeatureLoss):
    """Activation boundaries (Heo et al., AAAI 2019, arXiv:1811.03233, equation 5).

    Where the teacher's neuron is active the student's is pushed above `margin`, elsewhere below its negative; the sum
    of the squared lacks is divided by the number of samples and multiplied by 3/1000.

    Args:
        loss_weight: factor.
        margin: how far beyond the boundary the student should be.
    """

    def __init__(self, loss_weight: float = 1.0, margin: float = 1.0) -> None:
        super().__init__(loss_weight)
        self.margin = margin

    def forward_train(self, s_feature: Tensor, t_feature: Tensor) -> Tensor:
        """The lacks without their weight."""
        lack = torch.where(t_feature > 0, self.margin - s_feature, self.margin + s_feature).relu()
        return lack.square().sum() / len(s_feature) * 3 / 1000


@MODELS.register_module()
class OFDLoss(FeatureLoss):
    """The partial L2 of feature distillation (Heo et al., ICCV 2019, arXiv:1904.01866, equation 4).

    A place counts where the teacher is positive or the student above it.

    Args:
        loss_weight: factor.
        mul_factor: what the sum over a sample is divided by.
    """

    def __init__(self, loss_weight: float = 1.0, mul_factor: float = 1000.0) -> None:
        super().__init__(loss_weight)
        self.mul_factor = mul_factor

    def forward_train(self, s_feature: Tensor, t_feature: Tensor) -> Tensor:
        """The partial distance without its weight."""
        counts = (s_feature > t_feature) | (t_feature > 0)
        return ((s_feature - t_feature).square() * counts).sum() / len(s_feature) / self.mul_factor


@MODELS.register_module()
class MGDLoss(nn.Module):
    """Squared distance over the number of samples (Yang et al., ECCV 2022, arXiv:2205.01529), after `MGDConnector`.

    Args:
        alpha_mgd: factor.
    """

    def __init__(self, alpha_mgd: float = 0.00002) -> None:
        super().__init__()
        self.alpha_mgd = alpha_mgd

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        """The loss of features ``(N, C, H, W)`` of one shape."""
        check_same_shape(preds_S, preds_T)
        return self.alpha_mgd * (at_least_float32(preds_S) - preds_T).square().sum() / len(preds_S)
