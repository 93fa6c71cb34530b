"""Losses that compare relations: of the places of a channel, of features normalised, of the samples of a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastslim.contract_errors import AssertedValueError
from fastslim.distillers.loss_checks import at_least_float32, check_same_shape
from fastslim.registry import MODELS


@MODELS.register_module()
class ChannelWiseDivergence(nn.Module):
    """Channel-wise distillation (Shu et al., ICCV 2021, arXiv:2011.13256).

    ``loss_weight * tau^2 / (N C) * sum KL``: every channel's activations, softened over the places, are a
    distribution.

    Args:
        tau: temperature.
        loss_weight: factor.
    """

    def __init__(self, tau: float = 1.0, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.tau, self.loss_weight = tau, loss_weight

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        """The loss of features ``(N, C, H, W)`` of one shape."""
        check_same_shape(preds_S, preds_T)
        log_q, log_p = (
            (at_least_float32(x).flatten(2).flatten(0, 1) / self.tau).log_softmax(1) for x in (preds_S, preds_T)
        )
        return self.loss_weight * self.tau**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@MODELS.register_module()
class PKDLoss(nn.Module):
    """Pearson correlation of features (Cao et al., NeurIPS 2022, arXiv:2207.02039).

    Half the mean squared difference of features normalised per channel over batch and places.

    Args:
        loss_weight: factor.
        resize_stu: where the sizes differ, resize the student's feature to the teacher's, not the other way round.
    """

    def __init__(self, loss_weight: float = 1.0, resize_stu: bool = True) -> None:
        super().__init__()
        self.loss_weight, self.resize_stu = loss_weight, resize_stu

    def forward(self, preds_S: Tensor | tuple[Tensor, ...], preds_T: Tensor | tuple[Tensor, ...]) -> Tensor:
        """The loss of features ``(N, C, H, W)``, or the sum over several."""
        students, teachers = ((x,) if isinstance(x, Tensor) else tuple(x) for x in (preds_S, preds_T))
        if len(students) != len(teachers):
            raise AssertedValueError(f"the student has {len(students)} features and the teacher {len(teachers)}")
        losses = [
            self._of_one(at_least_float32(s), at_least_float32(t)) for s, t in zip(students, teachers, strict=True)
        ]
        return self.loss_weight * torch.stack(losses).sum()

    def _of_one(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.dim() != 4 or teacher.dim() != 4:
            raise AssertedValueError(
                f"the features should be (N, C, H, W), but got {tuple(student.shape)} and {tuple(teacher.shape)}"
            )
        if student.shape[2:] != teacher.shape[2:]:
            if self.resize_stu:
                student = F.interpolate(student, teacher.shape[2:], mode="bilinear")
            else:
                teacher = F.interpolate(teacher, student.shape[2:], mode="bilinear")
        check_same_shape(student, teacher)
        return F.mse_loss(self.norm(student), self.norm(teacher)) / 2

    def norm(self, feat: Tensor) -> Tensor:
        """A feature of mean 0 and variance 1 per channel."""
        std, mean = torch.std_mean(feat, dim=(0, 2, 3), keepdim=True)
        return (feat - mean) / (std + 1e-6)


class _RelationalLoss(nn.Module):
    """Smooth L1 distance of what :meth:`_relations` says of the samples of a batch."""

    def __init__(self, loss_weight: float, with_l2_norm: bool) -> None:
        super().__init__()
        self.loss_weight, self.with_l2_norm = loss_weight, with_l2_norm

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        """The loss of predictions or features ``(N, ...)``, whose sizes but the first may differ."""
        if len(preds_S) != len(preds_T):
            raise AssertedValueError(f"the student has {len(preds_S)} samples and the teacher {len(preds_T)}")
        student, teacher = (at_least_float32(x).flatten(1) for x in (preds_S, preds_T))
        if self.with_l2_norm:
            student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
        return self.loss_weight * F.smooth_l1_loss(self._relations(student), self._relations(teacher))

    def _relations(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must say what it compares")


@MODELS.register_module()
class DistanceWiseRKD(_RelationalLoss):
    """Relational distillation of distances (Park et al., CVPR 2019, arXiv:1904.05068, section 3.2.1).

    Distances of all pairs of samples, over their mean.

    Args:
        loss_weight: factor.
        with_l2_norm: give every sample the length 1 first.
    """

    def __init__(self, loss_weight: float = 25.0, with_l2_norm: bool = True) -> None:
        super().__init__(loss_weight, with_l2_norm)

    def _relations(self, x: Tensor) -> Tensor:
        square = x.square().sum(1)
        # Below 1e-12 the root's gradient would be without bound: two equal samples are 1e-6 apart.
        distance = (square[:, None] + square - 2 * x @ x.t()).clamp(min=1e-12).sqrt()
        distance = distance.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0)
        return distance / (distance.sum() / max(len(x) * (len(x) - 1), 1)).clamp(min=1e-12)


@MODELS.register_module()
class AngleWiseRKD(_RelationalLoss):
    """Relational distillation of angles (Park et al., CVPR 2019, arXiv:1904.05068, section 3.2.2).

    Cosines of the angles of all triples of samples.

    Args:
        loss_weight: factor.
        with_l2_norm: give every sample the length 1 first.
    """

    def __init__(self, loss_weight: float = 50.0, with_l2_norm: bool = True) -> None:
        super().__init__(loss_weight, with_l2_norm)

    def _relations(self, x: Tensor) -> Tensor:
        edges = F.normalize(x[None] - x[:, None], dim=2)
        return edges @ edges.transpose(1, 2)


@MODELS.register_module()
class FBKDLoss(nn.Module):
    """Feature-based distillation with attention and relations (Zhang & Ma, ICLR 2021, openreview uKhGRvM8QNH).

    Distances of masked features, of both pools and of the relations that `FBKDStudentConnector` and
    `FBKDTeacherConnector` give.

    Args:
        mask_l2_weight: of the features' distance, masked by both sides' spatial attention.
        channel_weight: of the distance of the features pooled over the places.
        spatial_weight: of the distance of the features pooled over the channels.
        nonloacl_weight: of the relations' distance; MMRazor's spelling.
        loss_weight: factor.
    """

    def __init__(
        self,
        mask_l2_weight: float = 7e-5,
        channel_weight: float = 4e-3,
        spatial_weight: float = 4e-3,
        nonloacl_weight: float = 7e-5,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.mask_l2_weight, self.channel_weight = mask_l2_weight, channel_weight
        self.spatial_weight, self.nonloacl_weight = spatial_weight, nonloacl_weight
        self.loss_weight = loss_weight

    def forward(self, s_input: tuple[Tensor, ...], t_input: tuple[Tensor, ...]) -> Tensor:
        """The loss of both connectors' results."""
        s_mask, _, s_channels, s_places, s_relation, s_feature = (at_least_float32(x) for x in s_input)
        t_mask, _, t_places, t_relation, t_feature = (at_least_float32(x) for x in t_input)
        mask = ((s_mask + t_mask) / 2).detach()
        return self.loss_weight * (
            self.mask_l2_weight * ((t_feature - s_feature).square() * mask).sum().clamp(min=1e-24).sqrt()
            + self.channel_weight * torch.dist(t_feature.mean((2, 3)), s_channels)
            + self.spatial_weight * torch.dist(t_places, s_places)
            + self.nonloacl_weight * torch.dist(t_relation, s_relation)
        )
