"""MobileNetV2 (Sandler et al., 2018): inverted residuals with linear bottlenecks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastslim.models.channels import check_model_options, scale_channels

# Table 2 of the paper: expansion, output channels, blocks, stride of the first block.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
FIRST_STRIDED_CHANNELS = 24


class ConvNormAct(nn.Sequential):
    """Convolution, BN, ReLU6."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU6(inplace=True),
        )


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1; the input is added where the shape allows."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = c_in * expansion
        self.has_residual = stride == 1 and c_in == c_out
        expand = [] if expansion == 1 else [ConvNormAct(c_in, hidden, 1)]
        self.conv = nn.Sequential(
            *expand,
            ConvNormAct(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) -> (N, c_out, H/stride, W/stride)."""
        return x + self.conv(x) if self.has_residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2.

    Args:
        num_classes: length of the logits.
        in_channels: channels of the images.
        small_images: the first two stride-2 convolutions get stride 1, for images of about 8 to 64 pixels.
        width_mult: factor on all channel counts, rounded to multiples of 8; the last layer never shrinks
            below 1280 channels.
    """

    def __init__(
        self, num_classes: int = 1000, in_channels: int = 3, small_images: bool = False, width_mult: float = 1.0
    ) -> None:
        super().__init__()
        check_model_options(num_classes, in_channels, width_mult)
        c_in = scale_channels(32, width_mult)
        blocks: list[nn.Module] = [ConvNormAct(in_channels, c_in, 3, stride=1 if small_images else 2)]
        for expansion, channels, depth, first_stride in STAGES:
            c_out = scale_channels(channels, width_mult)
            keep_size = small_images and channels == FIRST_STRIDED_CHANNELS
            for position in range(depth):
                stride = first_stride if position == 0 and not keep_size else 1
                blocks.append(InvertedResidual(c_in, c_out, stride, expansion))
                c_in = c_out
        c_last = scale_channels(1280, max(1.0, width_mult))
        blocks.append(ConvNormAct(c_in, c_last, 1))
        self.features = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(c_last, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to logits (N, num_classes)."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def mobilenet_v2(
    num_classes: int = 1000, in_channels: int = 3, small_images: bool = False, width_mult: float = 1.0
) -> MobileNetV2:
    """MobileNetV2: 3.5 M parameters, 301 M multiply-adds at 224 px. Arguments as `MobileNetV2`."""
    return MobileNetV2(num_classes, in_channels, small_images, width_mult)
