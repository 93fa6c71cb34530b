"""Normalisation of every kind, learned per-channel parameters, and torch's layers subclassed."""

import torch
import torch.nn.functional as F
from torch import nn

from .architecture import architecture, blocks, image
from .cnn import IMAGE, conv_bn


@architecture(IMAGE, {"stem": "stem.weight:0/4", "mid": "a.weight:0/2", "out": "last.weight:0"})
class GroupNormNet(nn.Module):
    """GroupNorm, whose groups keep their size, in a residual network; one group over everything."""

    def __init__(self, stem=4, mid=8, out=16):
        super().__init__()
        self.stem, self.n1 = nn.Conv2d(3, 4 * stem, 3, padding=1), nn.GroupNorm(stem, 4 * stem)
        self.a, self.n2 = nn.Conv2d(4 * stem, 2 * mid, 3, padding=1), nn.GroupNorm(mid, 2 * mid)
        self.b, self.last = nn.Conv2d(2 * mid, 4 * stem, 3, padding=1), nn.Conv2d(4 * stem, out, 1)
        self.n3, self.head = nn.GroupNorm(1, out), nn.Linear(out, 10)

    def forward(self, x):
        x = F.relu(self.n1(self.stem(x)))
        x = x + self.b(F.relu(self.n2(self.a(x))))
        return self.head(F.relu(self.n3(self.last(x))).mean((2, 3)))


def image_and_style(batch):
    return image(3, 8, 8)(batch) + image(6)(batch)


@architecture(
    image_and_style,
    {"stem": "stem.weight:0", "mid": "a.weight:0", "style": "mapping.weight:0"},
    {"affine.*:0": blocks(2)},
    classifies=False,
)
class StyleNet(nn.Module):
    """InstanceNorm with learned scales, and with scales and shifts predicted from a second input."""

    def __init__(self, stem=12, mid=16, style=8):
        super().__init__()
        self.stem, self.n1 = nn.Conv2d(3, stem, 3, padding=1), nn.InstanceNorm2d(stem, affine=True)
        self.a, self.n2 = nn.Conv2d(stem, mid, 3, padding=1), nn.InstanceNorm2d(mid)
        self.mapping, self.affine = nn.Linear(6, style), nn.Linear(style, 2 * mid)
        self.pad, self.out = nn.ReflectionPad2d(1), nn.Conv2d(mid, 3, 3)

    def forward(self, x, style):
        x = F.leaky_relu(self.n1(self.stem(x)), 0.2)
        h = self.affine(F.silu(self.mapping(style)))
        h = h.view(h.size(0), h.size(1), 1, 1)
        gamma, beta = torch.chunk(h, chunks=2, dim=1)
        x = (1 + gamma) * self.n2(self.a(x)) + beta
        return torch.tanh(self.out(self.pad(F.relu(x))))


@architecture(image(12), {"h1": "net.0.weight:0", "h2": "net.4.weight:0"})
class NormedMLP(nn.Module):
    """Linear layers with BatchNorm1d and a residual."""

    def __init__(self, h1=24, h2=16):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(12, h1, bias=False),
            nn.BatchNorm1d(h1),
            nn.ReLU(inplace=True),
            nn.Dropout(0.3),
            nn.Linear(h1, h2),
            nn.BatchNorm1d(h2),
            nn.ELU(),
        )
        self.again, self.norm, self.head = nn.Linear(h2, h2), nn.BatchNorm1d(h2, affine=False), nn.Linear(h2, 10)

    def forward(self, x):
        x = self.net(x)
        return self.head(self.norm(x + F.relu(self.again(x))))


@architecture(image(3, 8, 8), {"c1": "c1.weight:0", "c2": "c2.weight:0", "c3": "c3.weight:0"})
class LearnedChannels(nn.Module):
    """PReLU, learned scales and biases of several shapes, and a bank of them that is indexed."""

    def __init__(self, c1=8, c2=12, c3=16):
        super().__init__()
        self.c1, self.act1 = nn.Conv2d(3, c1, 3, padding=1), nn.PReLU(c1)
        self.c2, self.c3, self.act2 = nn.Conv2d(c1, c2, 3, padding=1), nn.Conv2d(c2, c3, 1), nn.PReLU()
        self.scale, self.bias = nn.Parameter(torch.ones(1, c2, 1, 1)), nn.Parameter(torch.zeros(c2))
        self.steps, self.position = nn.Parameter(torch.ones(2, c3)), nn.Parameter(torch.zeros(1, c3, 8, 8))
        self.head = nn.Linear(c3, 10)

    def forward(self, x):
        x = self.act1(self.c1(x))
        x = F.relu(self.c2(x) * self.scale + self.bias.view(1, -1, 1, 1))
        x = self.act2(self.c3(x)) + self.position
        x = x * self.steps[0][:, None, None] + self.steps[1].reshape(-1, 1, 1)
        return self.head(x.mean((2, 3)))


class BatchNormAct(nn.BatchNorm2d):
    """Batch norm and activation in one, as timm has it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(
            F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        )


class BatchNormScaled(nn.BatchNorm2d):
    """Batch norm by its parent's forward, then something else."""

    def forward(self, x):
        return super().forward(x) * 0.5


class Conv2dSame(nn.Conv2d):
    """TensorFlow's padding."""

    def forward(self, x):
        need = [
            max((-(-n // s) - 1) * s + k - n, 0)
            for n, k, s in zip(x.shape[-2:], self.kernel_size, self.stride, strict=True)
        ]
        x = F.pad(x, [need[1] // 2, need[1] - need[1] // 2, need[0] // 2, need[0] - need[0] // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class StdConv2d(nn.Conv2d):
    """Weight standardisation over what each filter reads."""

    def forward(self, x):
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0, eps=1e-6
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm of images, by permuting."""

    def forward(self, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


@architecture(
    IMAGE,
    {"c1": "c1.weight:0", "c2": "c2.weight:0", "c3": "c3.weight:0", "c4": "c4.weight:0"},
)
class Subclassed(nn.Module):
    """Layers of torch with a forward of their own."""

    def __init__(self, c1=8, c2=12, c3=16, c4=8):
        super().__init__()
        self.c1, self.n1 = Conv2dSame(3, c1, 3, stride=2), BatchNormAct(c1)
        self.c2, self.n2 = StdConv2d(c1, c2, 3, padding=1), BatchNormScaled(c2)
        self.c3, self.n3 = nn.Conv2d(c2, c3, 1), LayerNorm2d(c3)
        self.c4, self.head = Conv2dSame(c3, c4, 3), nn.Linear(c4, 10)

    def forward(self, x):
        x = self.n2(self.c2(self.n1(self.c1(x))))
        return self.head(F.relu(self.c4(self.n3(self.c3(F.relu(x))))).mean((2, 3)))


class FrozenNorm(nn.Module):
    """Batch norm whose statistics and scales are buffers, as torchvision's detectors have it."""

    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        rv, rm = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + 1e-5).rsqrt()
        return x * scale + (b - rm * scale)


class GlobalResponseNorm(nn.Module):
    """ConvNeXt-V2: every channel's energy, relative to the mean of all."""

    def __init__(self, channels):
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, channels, 1, 1)) for _ in range(2))

    def forward(self, x):
        energy = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
        return self.gamma * (x * (energy / (energy.mean(dim=1, keepdim=True) + 1e-6))) + self.beta + x


@architecture(IMAGE, {"c1": "c1.weight:0", "c2": "c2.weight:0", "c3": "c3.0.weight:0"})
class StatisticsInBuffers(nn.Module):
    """Frozen norms and norms of energies."""

    def __init__(self, c1=8, c2=16, c3=12):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, c1, 3, padding=1, bias=False), FrozenNorm(c1)
        self.c2, self.n2 = nn.Conv2d(c1, c2, 1), GlobalResponseNorm(c2)
        self.c3, self.head = conv_bn(c2, c3), nn.Linear(c3, 10)

    def forward(self, x):
        x = self.n2(F.gelu(self.c2(F.relu(self.n1(self.c1(x))))))
        return self.head(F.relu(self.c3(x)).amax((2, 3)))
