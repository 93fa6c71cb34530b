"""ResNet-18 and ResNet-50 (He et al., 2015; the stride of a bottleneck sits in its 3x3 convolution)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastslim.models.channels import check_model_options, scale_channels


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size at stride 1; its bias would be undone by the BN behind it."""
    return nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2, bias=False)


def shortcut(c_in: int, c_out: int, stride: int) -> nn.Sequential | None:
    """The projection beside a block that changes the shape; None where the identity fits."""
    if stride == 1 and c_in == c_out:
        return None
    return nn.Sequential(conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual add. (N, c_in, H, W) -> (N, channels, H/stride, W/stride)."""

    expansion = 1

    def __init__(self, c_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv(c_in, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut(c_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the block."""
        residual = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + residual)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a residual add. (N, c_in, H, W) -> (N, 4 * channels, H/stride, W/stride)."""

    expansion = 4

    def __init__(self, c_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        c_out = channels * self.expansion
        self.conv1 = conv(c_in, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv(channels, c_out, 1)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the block."""
        residual = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + residual)


def stage(
    block: type[BasicBlock] | type[Bottleneck], c_in: int, channels: int, depth: int, stride: int
) -> nn.Sequential:
    """``depth`` blocks; the first one changes size and channels."""
    c_out = channels * block.expansion
    return nn.Sequential(block(c_in, channels, stride), *(block(c_out, channels) for _ in range(depth - 1)))


class ResNet(nn.Module):
    """A residual network of four stages.

    Args:
        block: the residual block of all stages.
        depths: blocks per stage.
        num_classes: length of the logits.
        in_channels: channels of the images.
        small_images: a 3x3 stride-1 stem without max-pool, for images of about 8 to 64 pixels.
        width_mult: factor on all channel counts, rounded to multiples of 8.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int = 1000,
        in_channels: int = 3,
        small_images: bool = False,
        width_mult: float = 1.0,
    ) -> None:
        super().__init__()
        check_model_options(num_classes, in_channels, width_mult)
        stages = [scale_channels(64 * 2**i, width_mult) for i in range(4)]
        self.conv1 = conv(in_channels, stages[0], 3) if small_images else conv(in_channels, stages[0], 7, 2)
        self.bn1 = nn.BatchNorm2d(stages[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, stride=2, padding=1)
        outputs = [channels * block.expansion for channels in stages]
        self.layer1 = stage(block, stages[0], stages[0], depths[0], stride=1)
        self.layer2 = stage(block, outputs[0], stages[1], depths[1], stride=2)
        self.layer3 = stage(block, outputs[1], stages[2], depths[2], stride=2)
        self.layer4 = stage(block, outputs[2], stages[3], depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(outputs[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to logits (N, num_classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(
    num_classes: int = 1000, in_channels: int = 3, small_images: bool = False, width_mult: float = 1.0
) -> ResNet:
    """ResNet-18: 11.7 M parameters, 1.81 G multiply-adds at 224 px. Arguments as `ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, in_channels, small_images, width_mult)


def resnet50(
    num_classes: int = 1000, in_channels: int = 3, small_images: bool = False, width_mult: float = 1.0
) -> ResNet:
    """ResNet-50: 25.6 M parameters, 4.09 G multiply-adds at 224 px. Arguments as `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels, small_images, width_mult)
