"""Networks whose channels are sorted, one for each way in which tensors hang together."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import fastslim


def conv_bn(i: int, o: int, k: int = 3, **options: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, **options), nn.BatchNorm2d(o))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = conv_bn(3, 16), conv_bn(16, 24), conv_bn(24, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((x + self.b(self.a(x).relu())).mean((2, 3)))


class Concat(nn.Module):
    """Two branches and the input side by side, normalised together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 12, 3, padding=1)
        self.norm, self.out = nn.BatchNorm2d(23), nn.Conv2d(23, 4, 1)

    def forward(self, x):
        return self.out(self.norm(torch.cat([self.a(x), x, self.b(x)], 1)).relu())


class Grouped(nn.Module):
    """Groups of a convolution with fewer outputs than inputs, of a transposed one, and of a group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.g = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 16, 3, groups=4)
        self.up, self.norm = nn.ConvTranspose2d(16, 24, 2, groups=8), nn.GroupNorm(4, 24)
        self.wide, self.out = nn.ConvTranspose2d(24, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.out(self.wide(self.norm(self.up(self.g(self.stem(x)).relu()))).relu())


class Depthwise(nn.Module):
    """With a multiplier of 3, then flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dw = conv_bn(3, 8), conv_bn(8, 24, groups=8)
        self.out = nn.Linear(24 * 9, 4)

    def forward(self, x):
        return self.out(F.adaptive_avg_pool2d(self.dw(self.stem(x).relu()).relu(), 3).flatten(1))


class Gate(nn.Module):
    """Squeeze-and-excitation, a PReLU, a learned scale, an instance norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 16, 3), nn.InstanceNorm2d(16, affine=True), nn.PReLU(16)
        self.down, self.up, self.out = nn.Linear(16, 8), nn.Linear(8, 16), nn.Conv2d(16, 4, 1)
        self.gamma = nn.Parameter(torch.ones(16, 1, 1))

    def forward(self, x):
        x = self.act(self.norm(self.stem(x))) * self.gamma
        return self.out(x * self.up(self.down(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None])


class FusedAttention(nn.Module):
    """One layer for queries, keys and values; a learned bias for each head; positions; a layer scale that hides it."""

    def __init__(self, dim: int = 24, heads: int = 6) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.embed, self.norm = nn.Linear(5, dim), nn.LayerNorm(dim)
        self.qkv, self.proj, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Linear(dim, 4)
        self.bias, self.pos = nn.Parameter(torch.zeros(heads, 7, 7)), nn.Parameter(torch.zeros(1, 7, dim))
        self.scale = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x):
        x = self.embed(x) + self.pos
        B, N, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, N, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q @ k.transpose(-1, -2) + self.bias).softmax(-1)
        return self.out(x + self.scale * self.proj((attention @ v).transpose(1, 2).reshape(B, N, -1)))


class Encoder(nn.Module):
    """torch's own transformer layer: `nn.MultiheadAttention`, LayerNorm, MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(5, 16), nn.Linear(16, 4)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.1)

    def forward(self, x):
        return self.out(self.layer(self.embed(x)))


class Tied(nn.Module):
    """Tokens in and out through one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.up, self.down = nn.Embedding(11, 16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        x = self.tokens(x)
        return self.head(x + self.down(F.gelu(self.up(x))))


class Functional(nn.Module):
    """A weight without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(16, 3, 3, 3)), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.out(F.conv2d(x, self.weight).relu())


Case = tuple[Callable[[], nn.Module], tuple[int, ...]]
IMAGE = (2, 3, 9, 9)
CASES: dict[str, Case] = {
    **{net.__name__: (net, IMAGE) for net in (Residual, Concat, Grouped, Depthwise, Gate, Functional)},
    **{net.__name__: (net, (2, 7, 5)) for net in (FusedAttention, Encoder)},
    "Tied": (Tied, (2, 7)),
    "resnet18": (lambda: fastslim.models.resnet18(num_classes=4, small_images=True), IMAGE),
    "mobilenet_v2": (lambda: fastslim.models.mobilenet_v2(num_classes=4, small_images=True), IMAGE),
}


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    """(network in float64 and evaluation mode with all of its tensors random, random inputs)."""
    torch.manual_seed(0)
    build, shape = CASES[name]
    model = build().double().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.mul_(torch.rand_like(tensor) + 0.5).add_(0.1 * torch.rand_like(tensor) * tensor.abs().max())
            elif tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor))
    x = torch.randint(11, shape) if name == "Tied" else torch.randn(shape, dtype=torch.float64)
    return model, x
