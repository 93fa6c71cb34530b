"""The sandwich step as one would write it by hand: `torch.nn.functional` on `weight[:o, :i]`, network by network.

Nothing here uses fastslim. `widths` gives the output channels of every convolution by module name;
input widths follow from the data. Exactness tests compare with it, benchmarks run against it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Forward = Callable[["Net", Tensor], Tensor]


class Net:
    """A module's parameters and buffers, read through slices."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.widths: dict[str, int] = {}

    def conv(
        self, name: str, x: Tensor, stride: int = 1, padding: int = 0, columns: list[slice] | None = None
    ) -> Tensor:
        weight = self.tensors[f"{name}.weight"][: self.widths[name]]
        weight = weight[:, : x.shape[1]] if columns is None else torch.cat([weight[:, c] for c in columns], 1)
        return F.conv2d(x, weight, None, stride, padding)

    def grouped(self, name: str, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        weight = self.tensors[f"{name}.weight"][: self.widths[name]]
        return F.conv2d(x, weight, None, stride, padding, groups=x.shape[1] // weight.shape[1])

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            self.tensors[f"{name}.{key}"][: x.shape[1]] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-5)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"][:, : x.shape[1]], self.tensors[f"{name}.bias"])


def resnet18(net: Net, x: Tensor, small_images: bool = True) -> Tensor:
    x = net.conv("conv1", x, 1, 1) if small_images else net.conv("conv1", x, 2, 3)
    x = F.relu(net.norm("bn1", x))
    if not small_images:
        x = F.max_pool2d(x, 3, 2, 1)
    for stage in range(1, 5):
        for block in range(2):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = F.relu(net.norm(f"{name}.bn1", net.conv(f"{name}.conv1", x, stride, 1)))
            y = net.norm(f"{name}.bn2", net.conv(f"{name}.conv2", y, 1, 1))
            if f"{name}.downsample.0.weight" in net.tensors:
                x = net.norm(f"{name}.downsample.1", net.conv(f"{name}.downsample.0", x, stride))
            x = F.relu(y + x)
    return net.linear("fc", x.mean((2, 3)))


def resnet50(net: Net, x: Tensor) -> Tensor:
    x = F.max_pool2d(F.relu(net.norm("bn1", net.conv("conv1", x, 2, 3))), 3, 2, 1)
    for stage, depth in enumerate((3, 4, 6, 3), 1):
        for block in range(depth):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = F.relu(net.norm(f"{name}.bn1", net.conv(f"{name}.conv1", x)))
            y = F.relu(net.norm(f"{name}.bn2", net.conv(f"{name}.conv2", y, stride, 1)))
            y = net.norm(f"{name}.bn3", net.conv(f"{name}.conv3", y))
            if block == 0:
                x = net.norm(f"{name}.downsample.1", net.conv(f"{name}.downsample.0", x, stride))
            x = F.relu(y + x)
    return net.linear("fc", x.mean((2, 3)))


def mobilenet_v2(net: Net, x: Tensor, small_images: bool = True) -> Tensor:
    x = F.relu6(net.norm("features.0.1", net.conv("features.0.0", x, 1 if small_images else 2, 1)))
    strides = [1, 1 if small_images else 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1]
    for block, stride in enumerate(strides, 1):
        name, y = f"features.{block}.conv", x
        if block > 1:
            y = F.relu6(net.norm(f"{name}.0.1", net.conv(f"{name}.0.0", y)))
        depthwise = f"{name}.{int(block > 1)}"
        y = F.relu6(net.norm(f"{depthwise}.1", net.grouped(f"{depthwise}.0", y, stride)))
        last = 1 + int(block > 1)
        y = net.norm(f"{name}.{last + 1}", net.conv(f"{name}.{last}", y))
        full = net.tensors[f"{name}.{last}.weight"].shape[0]
        before = net.tensors["features.0.0.weight" if block == 1 else f"{_last_conv(net, block - 1)}.weight"].shape[0]
        x = x + y if stride == 1 and full == before else y
    x = F.relu6(net.norm("features.18.1", net.conv("features.18.0", x)))
    return net.linear("classifier.1", x.mean((2, 3)))


def _last_conv(net: Net, block: int) -> str:
    return f"features.{block}.conv.{1 if block == 1 else 2}"


class ConcatNet(nn.Module):
    """Two branches side by side, twice: concat -> BN -> convolution, and concat -> 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.Conv2d(3, 24, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(40)
        self.mix, self.mix_norm = nn.Conv2d(40, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)
        self.last, self.last_norm = nn.Conv2d(32 + 16, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        x = F.relu(self.norm(torch.cat([left, self.right(x)], 1)))
        x = F.relu(self.mix_norm(self.mix(x)))
        x = torch.cat([x, F.avg_pool2d(left, 2)], 1)
        x = F.relu(self.last_norm(self.last(x)))
        return self.fc(x.mean((2, 3)))


def concat_net(net: Net, x: Tensor) -> Tensor:
    left, right = net.conv("left", x, 1, 1), net.conv("right", x, 1, 1)
    a, b = left.shape[1], right.shape[1]
    mean, var, weight, bias = (net.tensors[f"norm.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
    parts = []
    for y, channels in ((left, slice(0, a)), (right, slice(16, 16 + b))):
        parts.append(F.batch_norm(y, mean[channels], var[channels], weight[channels], bias[channels], True, 0.1, 1e-5))
    x = F.relu(torch.cat(parts, 1))
    x = F.relu(net.norm("mix_norm", net.conv("mix", x, 2, 1, [slice(0, a), slice(16, 16 + b)])))
    c = x.shape[1]
    x = torch.cat([x, F.avg_pool2d(left, 2)], 1)
    x = F.relu(net.norm("last_norm", net.conv("last", x, columns=[slice(0, c), slice(32, 32 + a)])))
    return net.linear("fc", x.mean((2, 3)))


class GroupedNet(nn.Module):
    """A ResNeXt-like block: 1x1, grouped 3x3, 1x1, residual; then flatten -> linear over 4 x 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)
        self.reduce, self.reduce_norm = nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.group, self.group_norm = nn.Conv2d(32, 64, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(64)
        self.expand, self.expand_norm = nn.Conv2d(64, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        y = F.relu(self.reduce_norm(self.reduce(x)))
        y = F.relu(self.group_norm(self.group(y)))
        x = F.relu(x + self.expand_norm(self.expand(y)))
        return self.fc(F.max_pool2d(x, 2).flatten(1))


def grouped_net(net: Net, x: Tensor) -> Tensor:
    x = F.relu(net.norm("stem_norm", net.conv("stem", x, 2, 1)))
    y = F.relu(net.norm("reduce_norm", net.conv("reduce", x)))
    y = F.relu(net.norm("group_norm", net.grouped("group", y)))
    x = F.relu(x + net.norm("expand_norm", net.conv("expand", y)))
    return net.linear("fc", F.max_pool2d(x, 2).flatten(1))


def sandwich_passes(
    net: Net, forward: Forward, images: Tensor, labels: Tensor, subnets: list[dict[str, int]], mean: bool = False
) -> list[Tensor]:
    """Cross-entropy of the first subnet, KL to its detached output for the others; gradients are summed."""
    losses, teacher = [], None
    for widths in subnets:
        net.widths = widths
        logits = forward(net, images)
        logits = logits.double() if logits.dtype == torch.float64 else logits.float()
        if teacher is None:
            loss, teacher = F.cross_entropy(logits, labels), F.softmax(logits.detach(), 1)
        else:
            loss = F.kl_div(F.log_softmax(logits, 1), teacher, reduction="batchmean")
        (loss / len(subnets) if mean else loss).backward()
        losses.append(loss.detach())
    return losses
