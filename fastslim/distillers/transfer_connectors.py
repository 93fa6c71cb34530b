"""Connectors of single papers that bring one feature to another space: factor transfer, CRD, MGD."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastslim.contract_errors import AssertedValueError
from fastslim.distillers.connectors import BaseConnector
from fastslim.nn import SlimBatchNorm2d, SlimConv2d, SlimConvTranspose2d, SlimLinear
from fastslim.registry import MODELS


def _stages(layer: type[nn.Module], channels: list[int], use_bn: bool) -> nn.Sequential:
    """3x3 layers through these channels, each with an optional batch normalisation and a leaky ReLU."""
    layers: list[nn.Module] = []
    for c_in, c_out in pairwise(channels):
        norm = SlimBatchNorm2d(c_out) if use_bn else nn.Sequential()
        layers += [layer(c_in, c_out, 3, 1, 1), norm, nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


@MODELS.register_module()
class Paraphraser(BaseConnector):
    """The teacher's side of factor transfer (Kim et al., NeurIPS 2018, arXiv:1802.04977): an autoencoder.

    Args:
        in_channel: channels of the teacher's feature.
        out_channel: channels of its factor.
        phase: ``"pretrain"`` gives the reconstruction, ``"train"`` the factor, without gradient.
        use_bn: normalise after each layer.
        init_cfg: see :class:`BaseConnector`.
    """

    def __init__(
        self,
        in_channel: int,
        out_channel: int,
        phase: str = "pretrain",
        use_bn: bool = False,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if phase not in ("pretrain", "train"):
            raise AssertedValueError(f"phase should be 'pretrain' or 'train', but got {phase!r}")
        self.phase = phase
        self.encoder = _stages(SlimConv2d, [in_channel, in_channel, out_channel, out_channel], use_bn)
        self.decoder = _stages(SlimConvTranspose2d, [out_channel, out_channel, in_channel, in_channel], use_bn)

    def forward_train(self, x: Tensor) -> Tensor:
        """The factor ``(N, out_channel, H, W)``, without gradient."""
        with torch.no_grad():
            return self.encoder(x)

    def forward_pretrain(self, t_feat: Tensor) -> Tensor:
        """The reconstruction ``(N, in_channel, H, W)``."""
        return self.decoder(self.encoder(t_feat))

    def forward(self, x: Tensor) -> Tensor:
        """What the phase asks for."""
        return self.forward_train(x) if self.phase == "train" else self.forward_pretrain(x)


@MODELS.register_module()
class Translator(BaseConnector):
    """The student's side of factor transfer, see :class:`Paraphraser`.

    Args:
        in_channel: channels of the student's feature at full width; it may have fewer.
        out_channel: channels of the factor.
        use_bn: normalise after each layer.
        init_cfg: see :class:`BaseConnector`.
    """

    def __init__(
        self, in_channel: int, out_channel: int, use_bn: bool = True, init_cfg: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(init_cfg)
        self.encoder = _stages(SlimConv2d, [in_channel, in_channel, out_channel, out_channel], use_bn)

    def forward_train(self, x: Tensor) -> Tensor:
        """The factor ``(N, out_channel, H, W)``."""
        return self.encoder(x)


@MODELS.register_module()
class CRDConnector(BaseConnector):
    """A linear embedding of length 1, for :class:`CRDLoss` (Tian et al., ICLR 2020, arXiv:1910.10699).

    Args:
        dim_in: entries of a sample's feature, flattened, at full width.
        dim_out: length of the embedding.
        init_cfg: see :class:`BaseConnector`.
    """

    def __init__(self, dim_in: int = 1024, dim_out: int = 128, init_cfg: Mapping[str, Any] | None = None) -> None:
        super().__init__(init_cfg)
        self.linear = SlimLinear(dim_in, dim_out)

    def forward_train(self, x: Tensor) -> Tensor:
        """Maps ``(N, ...)`` to ``(N, dim_out)``."""
        return F.normalize(self.linear(x.flatten(1)))


@MODELS.register_module()
class MGDConnector(BaseConnector):
    """Makes the teacher's whole feature from a masked one of the student (Yang et al., ECCV 2022, arXiv:2205.01529).

    Args:
        student_channels: of the student's feature at full width.
        teacher_channels: of the teacher's; where they differ, a 1x1 convolution comes first.
        lambda_mgd: which share of the places is masked.
        mask_on_channel: mask channels instead.
        init_cfg: see :class:`BaseConnector`.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        lambda_mgd: float = 0.65,
        mask_on_channel: bool = False,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.lambda_mgd, self.mask_on_channel = lambda_mgd, mask_on_channel
        self.align = SlimConv2d(student_channels, teacher_channels, 1) if student_channels != teacher_channels else None
        self.generation = nn.Sequential(
            SlimConv2d(teacher_channels, teacher_channels, 3, padding=1),
            nn.ReLU(),
            SlimConv2d(teacher_channels, teacher_channels, 3, padding=1),
        )

    def forward_train(self, feature: Tensor) -> Tensor:
        """Maps ``(N, c, H, W)`` to ``(N, teacher_channels, H, W)``."""
        if self.align is not None:
            feature = self.align(feature)
        n, channels, height, width = feature.shape
        shape = (n, channels, 1, 1) if self.mask_on_channel else (n, 1, height, width)
        kept = torch.rand(shape, device=feature.device) <= 1 - self.lambda_mgd
        return self.generation(feature * kept)
