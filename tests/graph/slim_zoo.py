"""Small networks, one for each construct, and a reference without segments: masked full-width networks."""

import copy

import torch
import torch.nn.functional as F
from torch import nn


def conv_bn(i, o, k=3, **kw):
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **kw), nn.BatchNorm2d(o))


class Residual(nn.Module):
    """ResNet: post-activation blocks, one with a projection."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, 16), conv_bn(16, 24), conv_bn(24, 16)
        self.c, self.d, self.down = conv_bn(16, 16), conv_bn(16, 32, stride=2), conv_bn(16, 32, 1, stride=2)
        self.d2 = conv_bn(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.relu(self.b(F.relu(self.a(x), inplace=True)) + x)
        y = self.d2(F.relu(self.d(self.c(x)), inplace=True))
        y += self.down(x)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(y.relu(), 1), 1))


class InvertedResidual(nn.Module):
    """MobileNetV2: expansion, depthwise, projection; mean over space."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.expand, self.dw, self.project = conv_bn(8, 48, 1), conv_bn(48, 48, groups=48), conv_bn(48, 8, 1)
        self.expand2, self.dw2 = conv_bn(8, 16, 1), conv_bn(16, 32, groups=16, stride=2)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu6(self.stem(x))
        x = x + self.project(F.relu6(self.dw(F.relu6(self.expand(x)))))
        x = F.hardswish(self.dw2(F.silu(self.expand2(x))))
        return self.head(self.drop(x.mean([2, 3])))


class Dense(nn.Module):
    """DenseNet: growing concatenation, normalised and convolved depthwise."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 + 8 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(16 + 8 * i, 8, 3, padding=1) for i in range(3))
        self.dw = nn.Conv2d(40, 40, 3, padding=1, groups=40)
        self.norm, self.head = nn.BatchNorm2d(40), nn.Linear(40 * 4, 10)

    def forward(self, x):
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        x = F.relu(self.norm(self.dw(torch.cat(features, dim=1))))
        x = F.adaptive_avg_pool2d(x, 2)
        return self.head(x.view(x.size(0), -1))


class Inception(nn.Module):
    """Branches with pooling, side by side; the input joins in at full width."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.b1, self.b2, self.b3 = nn.Conv2d(12, 8, 1), nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(12, 24, 1)
        self.mix, self.head = nn.Conv2d(51, 16, 3, padding=1), nn.Linear(16, 10)

    def forward(self, x):
        y = F.relu(self.stem(x))
        y = torch.cat((self.b1(y), self.b2(y), x, self.b3(F.avg_pool2d(y, 3, 1, 1))), -3)
        return self.head(F.relu(self.mix(F.relu(y))).mean((2, 3)))


class Grouped(nn.Module):
    """ResNeXt: grouped convolutions, one with fewer outputs than inputs."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.g, self.b = (
            conv_bn(3, 16),
            conv_bn(16, 32, 1),
            conv_bn(32, 32, groups=4),
            conv_bn(32, 16, 1),
        )
        self.g2, self.head = conv_bn(16, 8, groups=2), nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.b(F.relu(self.g(F.relu(self.a(x))))))
        return self.head(F.relu(self.g2(x)).mean((2, 3)))


class FlattenHead(nn.Module):
    """VGG: 7 x 7 features, flattened into linear layers."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(True),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 24, 3, padding=1),
            nn.ReLU(True),
            nn.AdaptiveAvgPool2d(7),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(24 * 49, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10)
        )

    def forward(self, x):
        return self.classifier(self.features(x))


class Gate(nn.Module):
    """Squeeze-and-excitation: convolutional in one block, linear in the next."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.out = conv_bn(3, 16), conv_bn(16, 16), nn.Linear(16, 10)
        self.reduce, self.expand = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.fc1, self.fc2 = nn.Linear(16, 8), nn.Linear(8, 16)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.body(x)
        x = x + y * torch.sigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(y, 1)))))
        b, c, _, _ = x.size()
        gate = self.fc2(F.relu(self.fc1(x.mean((2, 3)).view(b, c)))).sigmoid().view(b, c, 1, 1)
        return self.out((x * gate.expand_as(x)).mean((-1, -2)))


class TwoHeads(nn.Module):
    """Two inputs, a dict of two outputs, an upsampled decoder, and a layer called twice."""

    def __init__(self):
        super().__init__()
        self.enc, self.deep, self.side = conv_bn(3, 16), conv_bn(16, 32, stride=2), conv_bn(1, 16)
        self.lateral, self.twice = nn.Conv2d(32, 16, 1), conv_bn(16, 16)
        self.mask, self.label = nn.Conv2d(16, 2, 1), nn.Linear(32, 10)

    def forward(self, image, depth, scale=1.0):
        x = F.relu(self.enc(image)) + self.side(depth)
        deep = F.relu(self.deep(x)) * scale
        up = F.interpolate(self.lateral(deep), size=x.shape[-2:], mode="nearest")
        up = self.twice(F.relu(self.twice(up + x)))
        return {"mask": self.mask(F.pad(up, (1, 1))), "label": self.label(deep.flatten(2).mean(-1))}


class TokenMixing(nn.Module):
    """Linear layers over the last dimension of three, after permuting."""

    def __init__(self):
        super().__init__()
        self.patch, self.up, self.down, self.head = (
            nn.Conv2d(3, 16, 4, 4),
            nn.Linear(16, 32),
            nn.Linear(32, 16),
            nn.Linear(16, 10),
        )

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))


IMAGE = (2, 3, 16, 16)
ZOO = {
    cls.__name__: (cls, (IMAGE,))
    for cls in (Residual, InvertedResidual, Dense, Inception, Grouped, FlattenHead, Gate, TokenMixing)
}
ZOO["TwoHeads"] = (TwoHeads, (IMAGE, (2, 1, 16, 16)))


def make(name, dtype=torch.float64):
    """(network with random weights and statistics, random inputs)."""
    torch.manual_seed(0)
    cls, shapes = ZOO[name]
    model = cls()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 0, 1)  # positive, so that no active channel is dead after ReLU
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.to(dtype), tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def masked(model, out_widths):
    """A plain full-width copy of `model` whose convolutions and linear layers give zeros beyond their width.

    Zero channels stay zero through batch norm and depthwise convolution (found by looking at the data), and a layer
    that reads zeros computes what a layer without these inputs would: it equals the narrow network, and it needs no
    knowledge of which channels belong together.
    """
    model = copy.deepcopy(model)

    def prefix(width):
        def hook(module, args, out):
            dim = 1 if isinstance(module, nn.Conv2d) else -1
            keep = torch.arange(out.shape[dim]) < width
            return out * keep.to(out.dtype).view([-1 if d == dim % out.dim() else 1 for d in range(out.dim())])

        return hook

    def follow(module, args, out):
        alive = (args[0] != 0).any(0).flatten(1).any(1)
        alive = alive.repeat_interleave(out.shape[1] // len(alive))
        return out * alive.to(out.dtype).view(-1, 1, 1)

    for name, width in out_widths.items():
        module = model.get_submodule(name)
        depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
        module.register_forward_hook(follow if depthwise or isinstance(module, nn.BatchNorm2d) else prefix(width))
    return model
