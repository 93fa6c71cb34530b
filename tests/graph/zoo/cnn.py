"""Convolutional networks of the classic kinds: residual, inverted, dense, parallel, grouped, gated, two-headed."""

import torch
import torch.nn.functional as F
from torch import nn

from .architecture import architecture, image, side


def conv_bn(i, o, k=3, **kw):
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **kw), nn.BatchNorm2d(o))


IMAGE = image(3, 16, 16)


@architecture(
    IMAGE,
    {"stem": "stem.0.weight:0", "a": "a.0.weight:0", "c": "c.0.weight:0", "d": "d.0.weight:0", "out": "head.weight:1"},
)
class Residual(nn.Module):
    """ResNet: post-activation blocks, one with a projection."""

    def __init__(self, stem=16, a=24, c=16, d=32, out=32):
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, stem), conv_bn(stem, a), conv_bn(a, stem)
        self.c, self.d, self.down = conv_bn(stem, c), conv_bn(c, d, stride=2), conv_bn(stem, out, 1, stride=2)
        self.d2 = conv_bn(d, out)
        self.head = nn.Linear(out, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.relu(self.b(F.relu(self.a(x), inplace=True)) + x)
        y = self.d2(F.relu(self.d(self.c(x)), inplace=True))
        y += self.down(x)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(y.relu(), 1), 1))


@architecture(IMAGE, {"stem": "stem.0.weight:0", "wide": "dw.0.weight:0", "wide2": "expand2.0.weight:0"})
class InvertedResidual(nn.Module):
    """MobileNetV2: expansion, depthwise (one with two outputs for each input), projection; mean over space."""

    def __init__(self, stem=8, wide=48, wide2=16):
        super().__init__()
        self.stem = conv_bn(3, stem)
        self.expand, self.dw = conv_bn(stem, wide, 1), conv_bn(wide, wide, groups=wide)
        self.project, self.expand2 = conv_bn(wide, stem, 1), conv_bn(stem, wide2, 1)
        self.dw2 = conv_bn(wide2, 2 * wide2, groups=wide2, stride=2)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(2 * wide2, 10)

    def forward(self, x):
        x = F.relu6(self.stem(x))
        x = x + self.project(F.relu6(self.dw(F.relu6(self.expand(x)))))
        x = F.hardswish(self.dw2(F.silu(self.expand2(x))))
        return self.head(self.drop(x.mean([2, 3])))


@architecture(
    IMAGE,
    {"stem": "stem.weight:0", "g0": "convs.0.weight:0", "g1": "convs.1.weight:0", "g2": "convs.2.weight:0"},
    {
        "norms.1.*:0": side("stem", "g0"),
        "convs.1.weight:1": side("stem", "g0"),
        "norms.2.*:0": side("stem", "g0", "g1"),
        "convs.2.weight:1": side("stem", "g0", "g1"),
        "dw.*:0": side("stem", "g0", "g1", "g2"),
        "norm.*:0": side("stem", "g0", "g1", "g2"),
        "head.weight:1": side(("stem", 4), ("g0", 4), ("g1", 4), ("g2", 4)),
    },
)
class Dense(nn.Module):
    """DenseNet: growing concatenation, normalised and convolved depthwise."""

    def __init__(self, stem=16, g0=8, g1=8, g2=8):
        super().__init__()
        self.stem = nn.Conv2d(3, stem, 3, padding=1)
        sizes = [stem, stem + g0, stem + g0 + g1]
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, sizes))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in zip(sizes, (g0, g1, g2), strict=True))
        total = sizes[-1] + g2
        self.dw = nn.Conv2d(total, total, 3, padding=1, groups=total)
        self.norm, self.head = nn.BatchNorm2d(total), nn.Linear(total * 4, 10)

    def forward(self, x):
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        x = F.relu(self.norm(self.dw(torch.cat(features, dim=1))))
        x = F.adaptive_avg_pool2d(x, 2)
        return self.head(x.view(x.size(0), -1))


@architecture(
    IMAGE,
    {"stem": "stem.0.weight:0", "b1": "b1.weight:0", "b2": "b2.weight:0", "b3": "b3.weight:0", "mix": "mix.weight:0"},
    {"mix.weight:1": side("b1", "b2", 3, "b3")},
)
class Inception(nn.Module):
    """Branches with pooling, side by side; the input joins in at full width."""

    def __init__(self, stem=12, b1=8, b2=16, b3=24, mix=16):
        super().__init__()
        self.stem = conv_bn(3, stem)
        self.b1, self.b2, self.b3 = nn.Conv2d(stem, b1, 1), nn.Conv2d(stem, b2, 3, padding=1), nn.Conv2d(stem, b3, 1)
        self.mix, self.head = nn.Conv2d(b1 + b2 + 3 + b3, mix, 3, padding=1), nn.Linear(mix, 10)

    def forward(self, x):
        y = F.relu(self.stem(x))
        y = torch.cat((self.b1(y), self.b2(y), x, self.b3(F.avg_pool2d(y, 3, 1, 1))), -3)
        return self.head(F.relu(self.mix(F.relu(y))).mean((2, 3)))


@architecture(IMAGE, {"halves": "stem.0.weight:0/8", "groups": "g.0.weight:0/8"})
class Grouped(nn.Module):
    """ResNeXt: grouped convolutions, whose groups keep their size; one with fewer outputs than inputs."""

    def __init__(self, halves=2, groups=4):
        super().__init__()
        stem, wide = 8 * halves, 8 * groups
        self.stem, self.a = conv_bn(3, stem), conv_bn(stem, wide, 1)
        self.g, self.b = conv_bn(wide, wide, groups=groups), conv_bn(wide, stem, 1)
        self.g2, self.head = conv_bn(stem, 4 * halves, groups=halves), nn.Linear(4 * halves, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.b(F.relu(self.g(F.relu(self.a(x))))))
        return self.head(F.relu(self.g2(x)).mean((2, 3)))


@architecture(IMAGE, {"c1": "features.0.weight:0", "c2": "features.3.weight:0", "hidden": "classifier.4.weight:1"})
class FlattenHead(nn.Module):
    """VGG: 7 x 7 features, flattened into linear layers."""

    def __init__(self, c1=16, c2=24, hidden=32):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, c1, 3, padding=1),
            nn.ReLU(True),
            nn.MaxPool2d(2),
            nn.Conv2d(c1, c2, 3, padding=1),
            nn.ReLU(True),
            nn.AdaptiveAvgPool2d(7),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(c2 * 49, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, 10)
        )

    def forward(self, x):
        return self.classifier(self.features(x))


@architecture(
    image(1, 28, 28), {"c1": "conv1.weight:0", "c2": "conv2.weight:0", "h1": "fc1.weight:0", "h2": "fc2.weight:0"}
)
class LeNet(nn.Module):
    """The tutorial's network: the flattened size is a literal number."""

    def __init__(self, c1=6, c2=16, h1=24, h2=16):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, c1, 5), nn.Conv2d(c1, c2, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(c2 * 16, h1), nn.Linear(h1, h2), nn.Linear(h2, 10)
        self.flat = c2 * 16

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv2(F.max_pool2d(F.relu(self.conv1(x)), (2, 2)))), 2)
        x = x.view(-1, 16 * 4 * 4)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))

    def narrow_forward(self, x):
        x = F.max_pool2d(F.relu(self.conv2(F.max_pool2d(F.relu(self.conv1(x)), (2, 2)))), 2)
        x = x.view(-1, self.flat)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


@architecture(IMAGE, {"stem": "stem.0.weight:0", "squeezed": "reduce.weight:0", "squeezed2": "fc1.weight:0"})
class Gate(nn.Module):
    """Squeeze-and-excitation: convolutional in one block, linear in the next."""

    def __init__(self, stem=16, squeezed=8, squeezed2=8):
        super().__init__()
        self.stem, self.body, self.out = conv_bn(3, stem), conv_bn(stem, stem), nn.Linear(stem, 10)
        self.reduce, self.expand = nn.Conv2d(stem, squeezed, 1), nn.Conv2d(squeezed, stem, 1)
        self.fc1, self.fc2 = nn.Linear(stem, squeezed2), nn.Linear(squeezed2, stem)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.body(x)
        x = x + y * torch.sigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(y, 1)))))
        b, c, _, _ = x.size()
        gate = self.fc2(F.relu(self.fc1(x.mean((2, 3)).view(b, c)))).sigmoid().view(b, c, 1, 1)
        return self.out((x * gate.expand_as(x)).mean((-1, -2)))


def image_and_depth(batch):
    return IMAGE(batch) + image(1, 16, 16)(batch)


@architecture(image_and_depth, {"stem": "enc.0.weight:0", "deep": "deep.0.weight:0"}, classifies=False)
class TwoHeads(nn.Module):
    """Two inputs, a dict of two outputs, an upsampled decoder, and a layer called twice."""

    def __init__(self, stem=16, deep=32):
        super().__init__()
        self.enc, self.deep, self.side = conv_bn(3, stem), conv_bn(stem, deep, stride=2), conv_bn(1, stem)
        self.lateral, self.twice = nn.Conv2d(deep, stem, 1), conv_bn(stem, stem)
        self.mask, self.label = nn.Conv2d(stem, 2, 1), nn.Linear(deep, 10)

    def forward(self, image, depth, scale=1.0):
        x = F.relu(self.enc(image)) + self.side(depth)
        deep = F.relu(self.deep(x)) * scale
        up = F.interpolate(self.lateral(deep), size=x.shape[-2:], mode="nearest")
        up = self.twice(F.relu(self.twice(up + x)))
        return {"mask": self.mask(F.pad(up, (1, 1))), "label": self.label(deep.flatten(2).mean(-1))}


@architecture(IMAGE, {"dim": "patch.weight:0", "hidden": "up.weight:0"})
class TokenMixing(nn.Module):
    """Linear layers over the last dimension of three, after permuting."""

    def __init__(self, dim=16, hidden=32):
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, dim, 4, 4), nn.Linear(dim, 10)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))
