"""MNasNet-B1 (Tan et al., 2018): searched inverted residuals of 3x3 and 5x5 depthwise convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastslim.models.channels import check_model_options, scale_channels

# Figure 7 of the paper without squeeze-and-excitation: kernel, stride, expansion, output channels, blocks.
STACKS = (
    (3, 2, 3, 24, 3),
    (5, 2, 3, 40, 3),
    (5, 2, 6, 80, 3),
    (3, 1, 6, 96, 2),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
# TensorFlow's 0.9997 is the share of the old statistics, torch's momentum that of the new ones.
BN_MOMENTUM = 1 - 0.9997


def conv_norm(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution that keeps the size at stride 1, and its BN."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(c_out, momentum=BN_MOMENTUM)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise, linear 1x1; the input is added where the shape allows."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = c_in * expansion
        self.has_residual = stride == 1 and c_in == c_out
        self.layers = nn.Sequential(
            *conv_norm(c_in, hidden, 1),
            nn.ReLU(inplace=True),
            *conv_norm(hidden, hidden, kernel, stride, groups=hidden),
            nn.ReLU(inplace=True),
            *conv_norm(hidden, c_out, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) -> (N, c_out, H/stride, W/stride)."""
        return x + self.layers(x) if self.has_residual else self.layers(x)


class MNASNet(nn.Module):
    """MNasNet-B1.

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
        c_stem, c_in = scale_channels(32, width_mult), scale_channels(16, width_mult)
        layers: list[nn.Module] = [
            *conv_norm(in_channels, c_stem, 3, stride=1 if small_images else 2),
            nn.ReLU(inplace=True),
            *conv_norm(c_stem, c_stem, 3, groups=c_stem),
            nn.ReLU(inplace=True),
            *conv_norm(c_stem, c_in, 1),
        ]
        for position, (kernel, first_stride, expansion, channels, depth) in enumerate(STACKS):
            c_out = scale_channels(channels, width_mult)
            stride = 1 if small_images and position == 0 else first_stride
            layers.append(
                nn.Sequential(
                    InvertedResidual(c_in, c_out, kernel, stride, expansion),
                    *(InvertedResidual(c_out, c_out, kernel, 1, expansion) for _ in range(depth - 1)),
                )
            )
            c_in = c_out
        c_last = scale_channels(1280, max(1.0, width_mult))
        self.layers = nn.Sequential(*layers, *conv_norm(c_in, c_last, 1), nn.ReLU(inplace=True))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(c_last, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, mode="fan_out", nonlinearity="sigmoid")
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to logits (N, num_classes)."""
        return self.classifier(torch.flatten(self.avgpool(self.layers(x)), 1))


def mnasnet(
    num_classes: int = 1000, in_channels: int = 3, small_images: bool = False, width_mult: float = 1.0
) -> MNASNet:
    """MNasNet-B1: 4.38 M parameters, 314 M multiply-adds at 224 px. Arguments as `MNASNet`."""
    return MNASNet(num_classes, in_channels, small_images, width_mult)
