"""A network of two convolutions with something unusual between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Nothing:
    """Nothing between the convolutions (can be pickled, unlike a lambda)."""

    def __call__(self, net, x):
        return x


class TwoConvolutions(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.channels = a
        self.a, self.bn = nn.Conv2d(3, a, 3, padding=1), nn.BatchNorm2d(a)
        self.b, self.head = nn.Conv2d(a, b, 3, padding=1), nn.Linear(b, 5)

    def forward(self, x):
        x = self.middle(self, self.bn(self.a(x)))
        return self.head(F.relu(self.b(F.relu(x))).mean((2, 3)))


def conv_net(middle: Any = None, a: int = 16, b: int = 16, **parts: Callable[[int], Any]) -> nn.Module:
    """Two convolutions with `middle(network, x)` between them; `parts` are made for the channels there."""
    net = TwoConvolutions(a, b)
    net.middle = middle or Nothing()
    for name, part in parts.items():
        setattr(net, name, part(a))
    return net


def branch_on_data(net, x):
    return net.one(x) if x.mean() > 0 else net.other(x)


def branch_on_a_number(net, x):
    return net.one(x) if x.detach().abs().amax().item() > 3 else x


def loop_on_data(net, x):
    for _ in range(int(x.shape[0] + x[0, 0, 0, 0].sign())):
        x = net.one(x)
    return x


def selected_by_data(net, x):
    return x[:, x.mean((0, 2, 3)).argsort()]


def masked_by_data(net, x):
    return x.masked_fill(x > x.mean(), 0.0)


def flipped(net, x):
    return net.one(x).flip(1)


def sorted_channels(net, x):
    return x.sort(dim=1)[0]


def cumulative(net, x):
    return x.cumsum(1)


def rolled(net, x):
    return x.roll(1, dims=1)


def strided(net, x):
    return torch.cat((x[:, ::2], x[:, 1::2]), 1)


def one_channel(net, x):
    return x * x[:, 3:4]


def last_channel(net, x):
    return x + x[:, -1:]


def written(net, x):
    x = x.clone()
    x[:, 1::2] = x[:, ::2]
    return x


def two_roles(net, x):
    weight = net.b.weight
    return F.conv2d(x, weight, padding=1) + F.conv2d(x, weight.transpose(0, 1), padding=1)


def numpy_detour(net, x):
    return x * float(x.detach().numpy().std())


def complex_scale(net, x):
    return (x * net.phase[:, None, None]).real


def integer_scale(net, x):
    return x * net.steps[:, None, None]


def spectrum(net, x):
    return torch.fft.ifft2(torch.fft.fft2(x) * 0.5).real


def pixels_as_channels(net, x):
    return x.transpose(1, 2).reshape(x.shape)


def by_number(net, x):
    return x.reshape(-1, net.channels * 64).reshape(-1, net.channels, 8, 8)


def mixed_channels(net, x):
    return torch.einsum("bchw,cd->bdhw", x, net.mix)


def loss_of_channels(net, x):
    return x - torch.logsumexp(x, 1, keepdim=True)


def with_vmap(net, x):
    return torch.vmap(lambda y: y * 2)(x)


def checkpointed(net, x):
    return torch.utils.checkpoint.checkpoint(net.one, x, use_reentrant=False)


def counted_channels(net, x):
    return x / x.shape[1] + sum(range(x.size(1)))


def same_size(n):
    return nn.Conv2d(n, n, 1)


def phases(n):
    return nn.Parameter(torch.linspace(0, 1, 2 * n).view(n, 2).double().view(n, 2)[:, 0] * (0.5 + 1j))


def whole_numbers(n):
    return nn.Parameter(torch.arange(n), requires_grad=False)


def mixing(n):
    return nn.Parameter(torch.randn(n, n))


def normed(norm):
    return lambda n: norm(same_size(n))


UNUSUAL: dict[str, tuple[Any, dict[str, Any]]] = {
    "branch": (branch_on_data, dict(one=same_size, other=same_size)),
    "number": (branch_on_a_number, dict(one=same_size)),
    "loop": (loop_on_data, dict(one=same_size)),
    "selection": (selected_by_data, {}),
    "mask": (masked_by_data, {}),
    "flip": (flipped, dict(one=same_size)),
    "sort": (sorted_channels, {}),
    "cumsum": (cumulative, {}),
    "roll": (rolled, {}),
    "stride": (strided, {}),
    "one channel": (one_channel, {}),
    "last channel": (last_channel, {}),
    "written": (written, {}),
    "two roles": (two_roles, {}),
    "numpy": (numpy_detour, {}),
    "complex": (complex_scale, dict(phase=phases)),
    "integer": (integer_scale, dict(steps=whole_numbers)),
    "spectrum": (spectrum, {}),
    "transposed": (pixels_as_channels, {}),
    "literal": (by_number, {}),
    "einsum": (mixed_channels, dict(mix=mixing)),
    "vmap": (with_vmap, {}),
    "checkpoint": (checkpointed, dict(one=same_size)),
    "channel count": (counted_channels, {}),
    "log sum": (loss_of_channels, {}),
    "weight norm": (lambda net, x: net.one(x), dict(one=normed(nn.utils.parametrizations.weight_norm))),
    "spectral norm": (lambda net, x: net.one(x), dict(one=normed(nn.utils.parametrizations.spectral_norm))),
    "old weight norm": (lambda net, x: net.one(x), dict(one=normed(nn.utils.weight_norm))),
}
