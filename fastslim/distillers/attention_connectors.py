"""Connectors of single papers that look at where a feature is active: be your own teacher, FBKD."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from fastslim import errors
from fastslim.contract_errors import AssertedValueError
from fastslim.distillers.connector_layers import BATCH_NORM, ConvModule
from fastslim.distillers.connectors import BaseConnector
from fastslim.nn import SlimBatchNorm2d, SlimConv2d, SlimLinear
from fastslim.registry import MODELS


def _separable(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Sequential:
    """DARTS' separable convolution (Liu et al. 2019, arXiv:1806.09055): twice ReLU, depthwise, 1x1, BN."""
    padding = kernel_size // 2
    return nn.Sequential(
        nn.ReLU(),
        SlimConv2d(in_channels, in_channels, kernel_size, stride, padding, groups=in_channels, bias=False),
        SlimConv2d(in_channels, in_channels, 1, bias=False),
        SlimBatchNorm2d(in_channels),
        nn.ReLU(),
        SlimConv2d(in_channels, out_channels, kernel_size, 1, padding, groups=in_channels, bias=False),
        SlimConv2d(out_channels, out_channels, 1, bias=False),
        SlimBatchNorm2d(out_channels),
    )


@MODELS.register_module()
class BYOTConnector(BaseConnector):
    """The attention, bottleneck and classifier on an early feature (Zhang et al., ICCV 2019, arXiv:1905.08094).

    Args:
        in_channel: ``in_channel * expansion`` are the channels of the feature at full width; it may have fewer.
        out_channel: ``out_channel * expansion`` are those of the last feature; a power of two times `in_channel`.
        num_classes: of the classifier.
        expansion: see above.
        pool_size: what is pooled at the end; a single place must be left.
        kernel_size: of the separable convolutions, 3 or 5.
        stride: of the separable convolutions, 2 in the attention, which is enlarged again.
        init_cfg: see :class:`BaseConnector`.
    """

    def __init__(
        self,
        in_channel: int,
        out_channel: int,
        num_classes: int,
        expansion: int = 4,
        pool_size: int | tuple[int, int] = 4,
        kernel_size: int = 3,
        stride: int = 1,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        stages = math.log2(out_channel / in_channel)
        if not stages.is_integer() or stages < 0:
            raise AssertedValueError(
                f"out_channel={out_channel} should be in_channel={in_channel} times a power of two"
            )
        widths = [in_channel * expansion * 2**i for i in range(int(stages) + 1)]
        self.attention = nn.Sequential(
            _separable(widths[0], widths[0], kernel_size, stride),
            SlimBatchNorm2d(widths[0]),
            nn.ReLU(),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.Sigmoid(),
        )
        blocks = [_separable(a, b, kernel_size, stride) for a, b in pairwise(widths)]
        self.scala = nn.Sequential(*blocks, nn.AvgPool2d(pool_size))
        self.fc = SlimLinear(out_channel * expansion, num_classes)

    def forward_train(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """The feature ``(N, out_channel * expansion)`` and the logits ``(N, num_classes)``."""
        attention = self.attention(feature)
        if attention.shape[2:] != feature.shape[2:]:
            raise AssertedValueError(
                f"the attention has size {tuple(attention.shape[2:])}, the feature {tuple(feature.shape[2:])}: "
                "choose stride=2, which halves what is doubled after it, and a feature of even size"
            )
        # The attention of a narrow feature's channels is that of the first ones.
        feature = self.scala(attention[:, : feature.shape[1]] * feature).flatten(1)
        return feature, self.fc(feature)


class _NonLocal(nn.Module):
    """A non-local block (Wang et al., CVPR 2018, arXiv:1711.07971): every place looks at all others.

    Args:
        in_channels: channels at full width; the input may have fewer.
        reduction: how many times fewer channels there are inside.
        norm_cfg: after the last convolution; its scale starts at 0, so that the block starts as the identity.
        mode: ``"dot_product"``, ``"embedded_gaussian"`` or ``"gaussian"``.
        sub_sample: pool what is looked at.
        maxpool_stride: by how much.
        zeros_init: see `norm_cfg`.
    """

    def __init__(
        self,
        in_channels: int,
        reduction: int,
        norm_cfg: Mapping[str, Any] | None,
        mode: str,
        sub_sample: bool,
        maxpool_stride: int,
        zeros_init: bool,
    ) -> None:
        super().__init__()
        modes = ("dot_product", "embedded_gaussian", "gaussian")
        if mode not in modes:
            raise AssertedValueError(f"mode={mode!r} is not available: {errors.nearest(mode, modes)}")
        inside = max(in_channels // reduction, 1)
        self.mode = mode
        self.g = ConvModule(in_channels, inside, 1)
        self.conv_out = ConvModule(inside, in_channels, 1, norm_cfg=norm_cfg)
        self.theta = ConvModule(in_channels, inside, 1) if mode != "gaussian" else nn.Identity()
        self.phi = ConvModule(in_channels, inside, 1) if mode != "gaussian" else nn.Identity()
        self.pool = nn.MaxPool2d(maxpool_stride) if sub_sample else nn.Identity()
        if zeros_init:
            last = self.conv_out.conv if self.conv_out.norm is None else self.conv_out.norm
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Adds to every place of ``(N, c, H, W)`` what it sees in the others."""
        values, keys = (self.pool(layer(x)).flatten(2).transpose(1, 2) for layer in (self.g, self.phi))
        queries = self.theta(x).flatten(2).transpose(1, 2)
        weights = queries @ keys.transpose(1, 2)
        if self.mode == "dot_product":
            weights = weights / keys.shape[1]
        else:
            scale = math.sqrt(queries.shape[-1]) if self.mode == "embedded_gaussian" else 1.0
            weights = (weights / scale).softmax(-1)
        seen = (weights @ values).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.conv_out(seen)[:, : x.shape[1]]


class _FBKDConnector(BaseConnector):
    def __init__(
        self,
        in_channels: int,
        reduction: int = 2,
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] | None = BATCH_NORM,
        mode: str = "dot_product",
        sub_sample: bool = False,
        maxpool_stride: int = 2,
        zeros_init: bool = True,
        spatial_T: float = 0.5,
        channel_T: float = 0.5,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if conv_cfg is not None and dict(conv_cfg) != {"type": "Conv2d"}:
            raise AssertedValueError(f"conv_cfg should be None or dict(type='Conv2d'), but got {conv_cfg!r}")
        self.in_channels, self.spatial_T, self.channel_T = in_channels, spatial_T, channel_T
        self._add_layers(_NonLocal(in_channels, reduction, norm_cfg, mode, sub_sample, maxpool_stride, zeros_init))

    def _add_layers(self, non_local: _NonLocal) -> None:
        raise NotImplementedError(f"{type(self).__name__} must say which layers it has")

    def _masks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Attention over the places and over the channels, whose means are 1."""
        places, channels = x.abs().mean(1, keepdim=True), x.abs().mean((2, 3), keepdim=True)
        spatial = (places.flatten(1) / self.spatial_T).softmax(1).view_as(places) * places[0].numel()
        return spatial, (channels / self.channel_T).softmax(1) * x.shape[1]


@MODELS.register_module()
class FBKDStudentConnector(_FBKDConnector):
    """The student's side of feature-based distillation (Zhang & Ma, ICLR 2021, openreview uKhGRvM8QNH).

    Args:
        in_channels: channels of both features at full width; the student's may have fewer.
        reduction: how many times fewer channels the non-local block has inside.
        conv_cfg: None or ``dict(type="Conv2d")``.
        norm_cfg: of the non-local block's last convolution.
        mode: of the non-local block, ``"dot_product"``, ``"embedded_gaussian"`` or ``"gaussian"``.
        sub_sample: the non-local block looks at a pooled feature.
        maxpool_stride: by how much it is pooled.
        zeros_init: the non-local block starts as the identity.
        spatial_T: temperature of the attention over the places.
        channel_T: temperature of the attention over the channels.
        init_cfg: see :class:`BaseConnector`.
    """

    def _add_layers(self, non_local: _NonLocal) -> None:
        in_channels = self.in_channels
        self.student_non_local = non_local
        self.channel_wise_adaptation = SlimLinear(in_channels, in_channels)
        self.spatial_wise_adaptation = nn.Conv2d(1, 1, 3, padding=1)
        self.adaptation_layers = SlimConv2d(in_channels, in_channels, 1)
        self.non_local_adaptation = SlimConv2d(in_channels, in_channels, 1)

    def forward_train(self, x: Tensor) -> tuple[Tensor, ...]:
        """Both masks, both pools, the relation and the feature, brought to the teacher's width."""
        return (
            *self._masks(x),
            self.channel_wise_adaptation(x.mean((2, 3))),
            self.spatial_wise_adaptation(x.mean(1, keepdim=True)),
            self.non_local_adaptation(self.student_non_local(x)),
            self.adaptation_layers(x),
        )


@MODELS.register_module()
class FBKDTeacherConnector(_FBKDConnector):
    """The teacher's side, see :class:`FBKDStudentConnector`."""

    def _add_layers(self, non_local: _NonLocal) -> None:
        self.teacher_non_local = non_local

    def forward_train(self, x: Tensor) -> tuple[Tensor, ...]:
        """Both masks, the pool over the channels, the relation and the feature itself."""
        return (*self._masks(x), x.mean(1, keepdim=True), self.teacher_non_local(x), x)
