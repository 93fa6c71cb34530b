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
    def __init__(self, a, between, b):
        super().__init__()
        self.channels = a
        self.a, self.bn = nn.Conv2d(3, a, 3, padding=1), nn.BatchNorm2d(a)
        self.b, self.head = nn.Conv2d(between, b, 3, padding=1), nn.Linear(b, 5)

    def forward(self, x):
        x = self.middle(self, self.bn(self.a(x)))
        return self.head(F.relu(self.b(F.relu(x))).mean((2, 3)))


def conv_net(
    middle: Any = None, a: int = 16, between: int = 16, b: int = 16, **parts: Callable[[int, int], Any]
) -> nn.Module:
    """Two convolutions with `middle(network, x)` between them; `parts` turn `a` channels into `between`."""
    net = TwoConvolutions(a, between, b)
    net.middle = middle or Nothing()
    for name, part in parts.items():
        setattr(net, name, part(a, between))
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
    return x * x[:, :1]


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


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2 + 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def own_gradient(net, x):
    return Doubled.apply(x) - net.one(x)


def into_another(net, x):
    return torch.add(x, 1, out=torch.empty_like(x)) if not torch.is_grad_enabled() else x + 1


def by_list(net, x):
    return torch.stack([t * 2 for t in x]) + torch.stack(x.unbind(1), 1)


def one_by_one(net, x):
    return torch.cat([x[:, i : i + 1] * (i + 1) for i in range(x.shape[1])], 1)


def transformed(net, x):
    return torch.func.functional_call(net.one, dict(net.one.named_parameters()), (x,))


def checkpointed(net, x):
    return torch.utils.checkpoint.checkpoint(net.one, x, use_reentrant=False)


def counted_channels(net, x):
    return x / x.shape[1] + sum(range(x.size(1)))


def conv(n, m):
    return nn.Conv2d(n, m, 1)


def phases(n, m):
    return nn.Parameter(torch.linspace(0, 1, n, dtype=torch.float64) * (0.5 + 1j))


def whole_numbers(n, m):
    return nn.Parameter(torch.arange(n), requires_grad=False)


def mixing(n, m):
    return nn.Parameter(torch.randn(n, m))


def normed(norm):
    return lambda n, m: norm(conv(n, m))


UNUSUAL: dict[str, tuple[Any, dict[str, Any]]] = {
    "branch": (branch_on_data, dict(one=conv, other=conv)),
    "number": (branch_on_a_number, dict(one=conv)),
    "loop": (loop_on_data, dict(one=conv)),
    "selection": (selected_by_data, {}),
    "mask": (masked_by_data, {}),
    "flip": (flipped, dict(one=conv)),
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
    "checkpoint": (checkpointed, dict(one=conv)),
    "own gradient": (own_gradient, dict(one=conv)),
    "out": (into_another, {}),
    "list": (by_list, {}),
    "one by one": (one_by_one, {}),
    "functional call": (transformed, dict(one=conv)),
    "channel count": (counted_channels, {}),
    "log sum": (loss_of_channels, {}),
    "weight norm": (lambda net, x: net.one(x), dict(one=normed(nn.utils.parametrizations.weight_norm))),
    "spectral norm": (lambda net, x: net.one(x), dict(one=normed(nn.utils.parametrizations.spectral_norm))),
    "old weight norm": (lambda net, x: net.one(x), dict(one=normed(nn.utils.weight_norm))),
}
