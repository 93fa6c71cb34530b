"""MobileNetV1 (Howard et al., 2017): depthwise-separable convolutions, no residuals."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastslim.models.channels import check_model_options, scale_channels

# Table 1 of the paper: output channels and stride of each separable convolution.
BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *(((512, 1),) * 5),
    (1024, 2),
    (1024, 1),
)
FIRST_STRIDED_BLOCK = 1


def conv_norm_act(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, BN, ReLU."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(inplace=True),
    )


def separable_conv(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """3x3 depthwise, then 1x1; each with BN and ReLU. (N, c_in, H, W) -> (N, c_out, H/stride, W/stride)."""
    return nn.Sequential(conv_norm_act(c_in, c_in, 3, stride, groups=c_in), conv_norm_act(c_in, c_out, 1))


class MobileNetV1(nn.Module):
    """MobileNetV1.

    Args:
        num_classes: length of the logits.
        in_channels: channels of the images.
        small_images: the first two stride-2 convolutions get stride 1, for images of about 8 to 64 pixels.
        width_mult: factor on all channel counts, rounded to multiples of 8.
    """

    def __init__(
        self, num_classes: int = 1000, in_channels: int = 3, small_images: bool = False, width_mult: float = 1.0
    ) -> None:
        super().__init__()
        check_model_options(num_classes, in_channels, width_mult)
        c_in = scale_channels(32, width_mult)
        blocks = [conv_norm_act(in_channels, c_in, 3, stride=1 if small_images else 2)]
        for position, (channels, stride) in enumerate(BLOCKS):
            c_out = scale_channels(channels, width_mult)
            keep_size = small_images and position == FIRST_STRIDED_BLOCK
            blocks.append(separable_conv(c_in, c_out, 1 if keep_size else stride))
            c_in = c_out
        self.features = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(c_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to logits (N, num_classes)."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def mobilenet_v1(
    num_classes: int = 1000, in_channels: int = 3, small_images: bool = False, width_mult: float = 1.0
) -> MobileNetV1:
    """MobileNetV1: 4.23 M parameters, 569 M multiply-adds at 224 px. Arguments as `MobileNetV1`."""
    return MobileNetV1(num_classes, in_channels, small_images, width_mult)
