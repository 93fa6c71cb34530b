"""Networks assembled from a list of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .architecture import Architecture, Widths, blocks, image
from .builder import Builder, Part, times


class Plain(nn.Module):
    def __init__(self, b: Builder, size: int) -> None:
        super().__init__()
        i, b.layout = b.layout, b.new("conv.weight:0", size)
        self.conv, self.norm = b.conv("conv", i, b.layout), b.norm("norm", b.layout)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, b: Builder, size: int) -> None:
        super().__init__()
        mid = b.new("a.weight:0", size)
        self.a, self.norm, self.c = b.conv("a", b.layout, mid), b.norm("norm", mid), b.conv("c", mid, b.layout)

    def forward(self, x):
        return x + self.c(F.relu(self.norm(self.a(x))))


class Append(nn.Module):
    def __init__(self, b: Builder, size: int) -> None:
        super().__init__()
        self.behind, new = size != 8, b.new("conv.weight:0", size)
        self.conv = b.conv("conv", b.layout, new, 1)
        b.layout = (*b.layout, *new) if self.behind else (*new, *b.layout)

    def forward(self, x):
        y = self.conv(x).tanh()
        return torch.cat((x, y) if self.behind else (y, x), 1)


class Depthwise(nn.Module):
    def __init__(self, b: Builder, size: int) -> None:
        super().__init__()
        i, multiplier = b.layout, 2 if size == 4 else 1
        b.layout = times(i, multiplier)
        self.conv = b.conv("conv", i, b.layout, groups=b.count(i))

    def forward(self, x):
        return self.conv(x)


class GroupedConv(nn.Module):
    def __init__(self, b: Builder, size: int) -> None:
        super().__init__()
        group = b.group(b.layout, 2 if size == 8 else 4)
        self.conv = b.conv("conv", b.layout, b.layout, groups=b.count(b.layout) // group)

    def forward(self, x):
        return F.silu(self.conv(x))


class GroupNorm(nn.Module):
    def __init__(self, b: Builder, size: int) -> None:
        super().__init__()
        b.cut("norm.*:0", b.layout)
        self.norm = nn.GroupNorm(b.count(b.layout) // b.group(b.layout, 4), b.count(b.layout))

    def forward(self, x):
        return self.norm(x)


class Squeeze(nn.Module):
    def __init__(self, b: Builder, size: int) -> None:
        super().__init__()
        mid = b.new("down.weight:0", size)
        self.down, self.up = b.linear("down", b.layout, mid), b.linear("up", mid, b.layout)

    def forward(self, x):
        return x * self.up(F.relu(self.down(x.mean((2, 3))))).sigmoid()[:, :, None, None]


class Gated(nn.Module):
    def __init__(self, b: Builder, size: int) -> None:
        super().__init__()
        i, b.layout = b.layout, b.new("conv.weight:0", size, 2)
        self.conv = b.conv("conv", i, (*b.layout, *b.layout), 1)

    def forward(self, x):
        a, gate = self.conv(x).chunk(2, dim=1)
        return a * gate.sigmoid()


class Split(nn.Module):
    def __init__(self, b: Builder, size: int) -> None:
        super().__init__()
        i = b.layout
        a, new = b.new("first.weight:1", size), b.new("first.weight:0", size)
        rest = b.new("second.weight:0", 12)
        b.layout = (*rest, *new)
        self.sizes = [b.count(a), b.count(rest)]
        self.conv = b.conv("conv", i, (*a, *rest), 1)
        self.first, self.second = b.conv("first", a, new), b.conv("second", rest, rest, 1)

    def forward(self, x):
        a, rest = self.conv(x).split(self.sizes, 1)
        return torch.cat((rest + self.second(rest), F.relu(self.first(a))), 1)


class Shuffle(nn.Module):
    def __init__(self, b: Builder, size: int) -> None:
        super().__init__()
        i, b.layout = b.layout, b.new("conv.weight:0", size)
        self.conv = b.conv("conv", i, b.layout, 1)
        b.cuts[f"{b.prefix}conv.*:0"] = blocks(2)  # each group keeps its first channels

    def forward(self, x):
        x = self.conv(x)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Resize(nn.Module):
    def __init__(self, b: Builder, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x):
        if self.size == 4:
            return F.avg_pool2d(x, 3, 1, 1)
        if self.size == 8:
            return F.interpolate(F.max_pool2d(x, 2), scale_factor=2, mode="nearest")
        return F.interpolate(F.adaptive_avg_pool2d(x, 3), x.shape[2:], mode="bilinear")


class Transposed(nn.Module):
    def __init__(self, b: Builder, size: int) -> None:
        super().__init__()
        i, b.layout = b.layout, b.new("up.weight:1", size)
        b.cut("up.weight:0", i)
        self.up = nn.ConvTranspose2d(b.count(i), b.count(b.layout), 2, 2)

    def forward(self, x):
        return F.max_pool2d(self.up(x), 2)


class Pixels(nn.Module):
    def __init__(self, b: Builder, size: int) -> None:
        super().__init__()
        i = times(b.layout, 4)
        b.layout = b.new("conv.weight:0", size, 4)
        self.conv = b.conv("conv", i, times(b.layout, 4))

    def forward(self, x):
        return F.pixel_shuffle(F.relu(self.conv(F.pixel_unshuffle(x, 2))), 2)


class Scaled(nn.Module):
    def __init__(self, b: Builder, size: int) -> None:
        super().__init__()
        for name in ("scale", "bias", "act.*"):
            b.cut(f"{name}:0", b.layout)
        channels = b.count(b.layout)
        self.scale, self.bias = nn.Parameter(torch.ones(channels, 1, 1)), nn.Parameter(torch.zeros(channels))
        self.act = nn.PReLU(channels)

    def forward(self, x):
        return self.act(x * self.scale + self.bias[None, :, None, None])


class Attention(nn.Module):
    def __init__(self, b: Builder, size: int) -> None:
        super().__init__()
        self.heads = b.sizes[b.new("out.weight:1", size // 4, 4)[0].widths[0][0]]
        b.cut("norm.*:0", b.layout)
        b.cut("qkv.weight:1", b.layout)
        b.cut("out.*:0", b.layout)
        b.cuts[f"{b.prefix}qkv.*:0"] = blocks(3)
        channels = b.count(b.layout)
        self.norm, self.qkv = nn.LayerNorm(channels), nn.Linear(channels, 12 * self.heads)
        self.out = nn.Linear(4 * self.heads, channels)

    def forward(self, x):
        n, _, h, w = x.shape
        y = self.norm(x.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(y).reshape(n, h * w, 3, self.heads, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, -1)
        return x + self.out(y).transpose(1, 2).unflatten(2, (h, w))


STEPS: tuple[type[Any], ...] = (
    Plain,
    Residual,
    Append,
    Depthwise,
    GroupedConv,
    GroupNorm,
    Squeeze,
    Gated,
    Split,
    Shuffle,
    Resize,
    Transposed,
    Pixels,
    Scaled,
    Attention,
)


class Assembled(nn.Module):
    """A stem, the steps, and a head behind pixels or their mean."""

    def __init__(self, steps: Sequence[tuple[type[Any], int]], flatten: bool, b: Builder) -> None:
        super().__init__()
        self.steps, self.flatten = nn.ModuleList(), flatten
        for number, (step, size) in enumerate([(Plain, 8), *steps]):
            b.prefix = f"steps.{number}."
            self.steps.append(step(b, size))
        b.prefix = ""
        self.head = b.linear("head", times(b.layout, 16) if flatten else b.layout, (Part((("one", 5),)),))

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return self.head(F.avg_pool2d(x, 2).flatten(1) if self.flatten else x.mean((2, 3)))


@dataclass(frozen=True)
class AssembledArchitecture(Architecture):
    """An architecture whose widths are named as they come."""

    sizes: Widths = field(default_factory=dict)

    @property
    def full_widths(self) -> dict[str, int]:
        return dict(self.sizes)


def assemble(steps: Sequence[tuple[type[Any], int]], flatten: bool) -> AssembledArchitecture:
    """The architecture of these steps (each with a size of 4, 8 or 12)."""

    def build(**widths: int) -> nn.Module:
        return Assembled(steps, flatten, Builder(widths))

    b = Builder({})
    Assembled(steps, flatten, b)
    sizes = {name: size for name, size in b.full.items() if name != "one"}
    return AssembledArchitecture(build, image(3, 8, 8), b.shown, b.cuts, sizes=sizes)
