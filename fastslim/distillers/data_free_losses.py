"""Losses of data-free learning (Chen et al., ICCV 2019, arXiv:1904.01186): what a teacher says of made-up images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from fastslim.contract_errors import AssertedRuntimeError
from fastslim.distillers.loss_checks import at_least_float32, check_one_of
from fastslim.registry import MODELS


class _DataFreeLoss(nn.Module):
    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, preds_T: Tensor) -> Tensor:
        """The loss of the teacher's logits ``(N, C)``."""
        return self.loss_weight * self.forward_train(at_least_float32(preds_T))

    def forward_train(self, preds_T: Tensor) -> Tensor:
        """The loss without its weight."""
        raise NotImplementedError(f"{type(self).__name__} must say what it computes")


@MODELS.register_module()
class OnehotLikeLoss(_DataFreeLoss):
    """Cross-entropy of the teacher's prediction with its own most likely class: small if it is sure.

    Args:
        loss_weight: factor.
    """

    def forward_train(self, preds_T: Tensor) -> Tensor:
        """The cross-entropy without its weight."""
        return F.cross_entropy(preds_T, preds_T.detach().argmax(1))


@MODELS.register_module()
class InformationEntropyLoss(_DataFreeLoss):
    """Negative entropy, in decimal digits, of the batch's mean prediction: small if all classes appear.

    Args:
        gather: take the mean over the batches of all processes, which should be equally large.
        loss_weight: factor.
    """

    def __init__(self, gather: bool = True, loss_weight: float = 1.0) -> None:
        super().__init__(loss_weight)
        self.gather = gather
        self.world_size = distributed.get_world_size() if _in_a_group() else 1

    def forward_train(self, preds_T: Tensor) -> Tensor:
        """The negative entropy without its weight."""
        if self.gather and self.world_size > 1:
            if not _in_a_group():
                raise AssertedRuntimeError(
                    "Default process group has not been initialized, so predictions can not be gathered: call "
                    "torch.distributed.init_process_group, or choose gather=False"
                )
            mean = _SumOverProcesses.apply(preds_T.softmax(1).mean(0)) / distributed.get_world_size()
        else:
            mean = preds_T.softmax(1).mean(0)
        return torch.special.xlogy(mean, mean).sum() / torch.tensor(10.0, dtype=mean.dtype).log().item()


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        distributed.all_reduce(total)
        return total


def _in_a_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@MODELS.register_module()
class ActivationLoss(nn.Module):
    """Negative size of the teacher's features: small if they are active.

    Args:
        loss_weight: factor.
        norm_type: ``"abs"``, the mean absolute value, or ``"norm"``, the Euclidean norm of the batch.

    Raises:
        FastslimValueError: an unknown norm.
    """

    def __init__(self, loss_weight: float = 1.0, norm_type: str = "abs") -> None:
        super().__init__()
        check_one_of("norm_type", norm_type, ("norm", "abs"))
        self.loss_weight, self.norm_type = loss_weight, norm_type

    def forward(self, feat_T: Tensor) -> Tensor:
        """The loss of features ``(N, ...)``."""
        feature = at_least_float32(feat_T)
        return -self.loss_weight * (feature.abs().mean() if self.norm_type == "abs" else feature.norm())
