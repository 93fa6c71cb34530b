"""Contrastive representation distillation: a sample's feature against a memory of the other side's features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastslim import errors
from fastslim.contract_errors import AssertedTypeError, AssertedValueError
from fastslim.distillers.loss_checks import at_least_float32
from fastslim.registry import MODELS


@MODELS.register_module()
class CRDLoss(nn.Module):
    """Contrastive representation distillation (Tian et al., ICLR 2020, arXiv:1910.10699, equations 17 to 19).

    Each side keeps a memory of its features of all training samples. The score of a feature with the other side's
    memory of sample j is ``exp(<f, m_j> / temperature) / Z``; the own sample should be told from `neg_num` others
    drawn at random: ``-(log(s / (s + k/n)) + sum log((k/n) / (s_j + k/n)))`` with k = neg_num and n = sample_n.
    ``Z`` is the mean score of the first batch times n.

    Args:
        loss_weight: factor.
        temperature: of the scores.
        neg_num: how many other samples each is compared with.
        sample_n: number of training samples.
        dim_out: length of the features.
        momentum: how much of a memory is kept when its sample comes by.
        eps: guards the logarithms.
    """

    memory_v1: Tensor
    memory_v2: Tensor
    normalization: Tensor

    def __init__(
        self,
        loss_weight: float = 1.0,
        temperature: float = 0.07,
        neg_num: int = 16384,
        sample_n: int = 50000,
        dim_out: int = 128,
        momentum: float = 0.5,
        eps: float = 1e-7,
    ) -> None:
        super().__init__()
        self.loss_weight, self.temperature, self.neg_num, self.sample_n = loss_weight, temperature, neg_num, sample_n
        self.momentum, self.eps = momentum, eps
        bound = 1 / math.sqrt(dim_out / 3)
        for name in ("memory_v1", "memory_v2"):  # of the student, of the teacher
            self.register_buffer(name, torch.empty(sample_n, dim_out).uniform_(-bound, bound))
        self.register_buffer("normalization", torch.full((2,), -1.0))  # unknown until the first batch

    def forward(self, s_feats: Tensor, t_feats: Tensor, data_samples: Sequence[Any]) -> Tensor:
        """The loss of features ``(N, dim_out)``.

        Args:
            s_feats: the student's, from a :class:`CRDConnector`.
            t_feats: the teacher's.
            data_samples: of every sample, an object or dict with ``sample_idx``, its number as a tensor, and perhaps
                ``contrast_sample_idxs`` ``(1 + neg_num,)``, the numbers to compare with, its own first.
        """
        student, teacher = at_least_float32(s_feats), at_least_float32(t_feats)
        own = torch.stack([_number(sample, "sample_idx") for sample in data_samples]).to(student.device).reshape(-1)
        shape = (len(own), self.memory_v1.shape[1])
        if student.shape != shape or teacher.shape != shape:
            raise AssertedValueError(
                f"the features of {shape[0]} samples should be {shape}, but got {tuple(student.shape)} and "
                f"{tuple(teacher.shape)}: choose dim_out, or a CRDConnector in front"
            )
        if _value(data_samples[0], "contrast_sample_idxs") is not None:
            others = torch.stack([_number(sample, "contrast_sample_idxs") for sample in data_samples])
            others = others.to(student.device)
        else:
            others = torch.randint(self.sample_n, (len(own), self.neg_num + 1), device=student.device)
            others[:, 0] = own
        loss = self._told_apart(student, self.memory_v2, others, 0) + self._told_apart(
            teacher, self.memory_v1, others, 1
        )
        self._remember(self.memory_v1, student, own)
        self._remember(self.memory_v2, teacher, own)
        return self.loss_weight * loss

    def _told_apart(self, features: Tensor, memory: Tensor, others: Tensor, side: int) -> Tensor:
        scores = (memory[others].to(features.dtype) @ features[:, :, None])[:, :, 0].div(self.temperature).exp()
        with torch.no_grad():
            known = self.normalization[side]
            self.normalization[side] = torch.where(known < 0, (scores.mean() * self.sample_n).to(known.dtype), known)
        scores = scores / self.normalization[side].clone()
        noise = (others.shape[1] - 1) / self.sample_n
        positive, negative = scores[:, 0], scores[:, 1:]
        return -(
            (positive / (positive + noise + self.eps)).log().sum() + (noise / (negative + noise + self.eps)).log().sum()
        ) / len(features)

    @torch.no_grad()
    def _remember(self, memory: Tensor, features: Tensor, own: Tensor) -> None:
        mixed = self.momentum * memory[own] + (1 - self.momentum) * features.to(memory.dtype)
        memory[own] = F.normalize(mixed)


def _value(sample: Any, name: str) -> Any:
    return sample.get(name) if isinstance(sample, Mapping) else getattr(sample, name, None)


def _number(sample: Any, name: str) -> Tensor:
    value = _value(sample, name)
    if value is None:
        raise errors.FastslimValueError(f"a data sample has no {name!r}: the dataset must say which sample it is")
    if not isinstance(value, Tensor):
        raise AssertedTypeError(f"{name!r} must be a tensor, but got {type(value).__name__}: {value!r}")
    return value
