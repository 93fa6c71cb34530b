"""Small networks for small devices: channel shuffles, gates of every kind, cheap channels."""

import torch
import torch.nn.functional as F
from torch import nn

from .architecture import architecture, blocks, image, side
from .cnn import IMAGE, conv_bn


def shuffle(x, groups):
    b, c, h, w = x.size()
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)


@architecture(
    IMAGE,
    {"stem": "stem.0.weight:0/4", "mid": "g1.0.weight:0/4", "new": "d2.0.weight:0", "out": "last.0.weight:0"},
    # Of the channels that a shuffle of four groups takes in turn, each group keeps its first ones.
    {"last.0.weight:1": side(("stem", 4), "new"), "g1.*:0": blocks(4)},
)
class ShuffleV1(nn.Module):
    """Grouped 1 x 1 convolutions with a shuffle between them; the strided block appends to the pooled input.

    Behind the shuffle each layer takes the first channels; whole groups of four are active.
    """

    def __init__(self, stem=4, mid=4, new=8, out=16):
        super().__init__()
        c, m = 4 * stem, 4 * mid
        self.stem, self.g1 = conv_bn(3, c), conv_bn(c, m, 1)
        self.dw, self.g2 = conv_bn(m, m, groups=m), conv_bn(m, m, 1, groups=mid)
        self.back = conv_bn(m, c, 1)
        self.d1, self.d2 = conv_bn(c, c, 1, groups=stem), conv_bn(c, new, 3, stride=2)
        self.last, self.head = conv_bn(c + new, out, 1), nn.Linear(out, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = shuffle(F.relu(self.g1(x)), 4)
        x = F.relu(x + self.back(self.g2(self.dw(y))))
        y = self.d2(shuffle(F.relu(self.d1(x)), 4))
        x = F.relu(torch.cat((F.avg_pool2d(x, 3, stride=2, padding=1), y), 1))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


@architecture(
    IMAGE,
    {
        "stem": "stem.0.weight:0",
        "left": "left.1.0.weight:0",
        "hidden": "a.0.weight:0",
        "right": "c.0.weight:0",
        "hidden2": "d.0.weight:0",
        "unit": "f.0.weight:0",
        "out": "last.0.weight:0",
    },
    units=0,
)
class ShuffleV2(nn.Module):
    """Half of the channels passes by, the other is convolved; concatenated and shuffled."""

    def __init__(self, stem=8, left=12, hidden=12, right=12, hidden2=12, unit=12, out=16):
        super().__init__()
        half = (left + right) // 2
        self.stem = conv_bn(3, stem)
        self.left = nn.Sequential(conv_bn(stem, stem, stride=2, groups=stem), conv_bn(stem, left, 1))
        self.a, self.b = conv_bn(stem, hidden, 1), conv_bn(hidden, hidden, stride=2, groups=hidden)
        self.c = conv_bn(hidden, right, 1)
        self.d, self.e = conv_bn(half, hidden2, 1), conv_bn(hidden2, hidden2, groups=hidden2)
        self.f = conv_bn(hidden2, unit, 1)
        self.last, self.head = conv_bn(half + unit, out, 1), nn.Linear(out, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = torch.cat((F.relu(self.left(x)), F.relu(self.c(self.b(F.relu(self.a(x)))))), dim=1)
        x1, x2 = shuffle(x, 2).chunk(2, dim=1)
        x = shuffle(torch.cat((x1, F.relu(self.f(self.e(F.relu(self.d(x2)))))), dim=1), 2)
        return self.head(F.relu(self.last(x)).mean([2, 3]))


class DropPath(nn.Module):
    """Stochastic depth, for each sample of the batch."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if self.p == 0.0 or not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * keep.div_(1 - self.p)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation with hard gates."""

    def __init__(self, channels, squeezed):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.expand = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.act, self.gate = nn.SiLU(inplace=True), nn.Hardsigmoid()

    def forward(self, x):
        scale = self.pool(x)
        scale = self.gate(self.expand(self.act(self.reduce(scale))))
        return scale * x


@architecture(
    IMAGE,
    {"stem": "stem.0.weight:0", "wide": "dw.0.weight:0", "squeezed": "se.reduce.weight:0", "last": "head.weight:1"},
)
class MBConv(nn.Module):
    """EfficientNet: inverted bottleneck with SiLU, squeeze-and-excitation and stochastic depth."""

    def __init__(self, stem=8, wide=32, squeezed=6, last=24):
        super().__init__()
        self.stem, self.expand = conv_bn(3, stem, stride=2), conv_bn(stem, wide, 1)
        self.dw, self.se = conv_bn(wide, wide, 5, groups=wide), SqueezeExcite(wide, squeezed)
        self.project, self.drop_path = conv_bn(wide, stem, 1), DropPath(0.2)
        self.last, self.head = conv_bn(stem, last, 1), nn.Linear(last, 10)

    def forward(self, x):
        x = F.silu(self.stem(x))
        y = self.project(self.se(F.silu(self.dw(F.silu(self.expand(x))))))
        x = self.drop_path(y) + x
        return self.head(F.dropout(F.silu(self.last(x)).mean((2, 3)), 0.0, self.training))


@architecture(
    IMAGE,
    {"stem": "primary.0.weight:0", "half": "primary2.0.weight:0", "out": "last.weight:0"},
    {"last.weight:1": side("half", "half"), "primary2.0.weight:1": side("stem", "stem")},
)
class Ghost(nn.Module):
    """GhostNet: half of the channels are cheap depthwise copies of the other half; a slice drops what is too much."""

    def __init__(self, stem=8, half=12, out=16):
        super().__init__()
        self.primary, self.cheap = conv_bn(3, stem), conv_bn(stem, stem, groups=stem)
        self.primary2, self.cheap2 = conv_bn(2 * stem, half, 1), conv_bn(half, half, groups=half)
        self.last, self.head = nn.Conv2d(2 * half, out, 1), nn.Linear(out, 10)
        self.sizes = 2 * stem, 2 * half

    def forward(self, x):
        x = F.relu(self.primary(x))
        x = torch.cat([x, self.cheap(x)], dim=1)[:, : self.sizes[0], :, :]
        x = F.relu(self.primary2(x))
        x = torch.cat([x, self.cheap2(x)], dim=1)[:, : self.sizes[1]]
        return self.head(F.relu(self.last(x)).mean((2, 3)))


@architecture(IMAGE, {"stem": "stem.0.weight:0", "body": "body.0.weight:0", "out": "last.0.weight:0"})
class ECA(nn.Module):
    """Efficient channel attention: a convolution along the channels, as many as there are."""

    def __init__(self, stem=12, body=16, out=24):
        super().__init__()
        self.stem, self.body, self.last = conv_bn(3, stem), conv_bn(stem, body), conv_bn(body, out)
        self.conv, self.head = nn.Conv1d(1, 1, 3, padding=1, bias=False), nn.Linear(out, 10)

    def forward(self, x):
        x = self.body(F.relu(self.stem(x)))
        y = F.adaptive_avg_pool2d(x, 1)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        x = x * y.sigmoid().expand_as(x)
        return self.head(F.relu(self.last(x)).mean((2, 3)))


@architecture(IMAGE, {"stem": "stem.0.weight:0", "hidden": "mlp.0.weight:0"})
class CBAM(nn.Module):
    """Channel attention from two poolings and one shared MLP, then spatial attention from mean and maximum."""

    def __init__(self, stem=16, hidden=6):
        super().__init__()
        self.stem = conv_bn(3, stem)
        self.mlp = nn.Sequential(nn.Conv2d(stem, hidden, 1, bias=False), nn.ReLU(), nn.Conv2d(hidden, stem, 1))
        self.spatial, self.head = nn.Conv2d(2, 1, 7, padding=3), nn.Linear(stem, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        gate = self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1))
        x = x * torch.sigmoid(gate)
        pooled = torch.cat([torch.mean(x, dim=1, keepdim=True), torch.max(x, dim=1, keepdim=True)[0]], dim=1)
        return self.head((x * self.spatial(pooled).sigmoid()).mean((2, 3)))


@architecture(image(3, 8, 16), {"stem": "stem.0.weight:0", "mid": "mid.0.weight:0"})
class CoordinateAttention(nn.Module):
    """Pools rows and columns, convolves them side by side, and gates with both."""

    def __init__(self, stem=16, mid=8):
        super().__init__()
        self.stem, self.mid = conv_bn(3, stem), conv_bn(stem, mid, 1)
        self.pool_h, self.pool_w = nn.AdaptiveAvgPool2d((None, 1)), nn.AdaptiveAvgPool2d((1, None))
        self.conv_h, self.conv_w = nn.Conv2d(mid, stem, 1), nn.Conv2d(mid, stem, 1)
        self.head = nn.Linear(stem, 10)

    def forward(self, x):
        x = self.stem(x)
        n, c, h, w = x.size()
        y = torch.cat([self.pool_h(x), self.pool_w(x).permute(0, 1, 3, 2)], dim=2)
        y = F.hardswish(self.mid(y))
        x_h, x_w = torch.split(y, [h, w], dim=2)
        x = x * self.conv_h(x_h).sigmoid() * self.conv_w(x_w.permute(0, 1, 3, 2)).sigmoid()
        return self.head(x.flatten(2).mean(2))


@architecture(image(12), {"dim": "first.weight:0"})
class Highway(nn.Module):
    """Gates between a layer's output and its input."""

    def __init__(self, dim=16):
        super().__init__()
        self.first, self.head = nn.Linear(12, dim), nn.Linear(dim, 10)
        self.transform = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        for transform, gate in zip(self.transform, self.gates, strict=True):
            t = torch.sigmoid(gate(x))
            x = F.relu(transform(x)) * t + x * (1 - t)
        return self.head(x)
