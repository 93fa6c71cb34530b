"""What lies between two layers is followed: narrow networks equal the same network built with plain layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo.architecture import Architecture, blocks, image, randomise, side
from zoo.check import RATIOS, assert_same, narrow_copy

import fastslim


class Around(nn.Module):
    """Two convolutions around an operation."""

    def __init__(self, c, between, **parts):
        super().__init__()
        self.c, self.between = c, between
        self.first, self.second = nn.Conv2d(3, c, 3, padding=1), nn.Conv2d(c, 6, 3, padding=1)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.second(self.between(self, self.first(x))).mean((2, 3))


class Standardised(nn.Conv2d):
    """Computes its own weight."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class Rectified(nn.Conv2d):
    """A subclass that only adds to what the class does."""

    def forward(self, x):
        return F.relu(super().forward(x))


def sliced(a=4, b=8, left=5, right=3):
    """Two halves of one layer's channels go separate ways."""

    def between(s, x):
        return torch.cat([s.left(x[:, : s.a]), s.right(x[:, s.a :])], 1)

    model = Around(a + b, between, left=nn.Conv2d(a, left, 1), right=nn.Conv2d(b, right, 1), a=a)
    model.second = nn.Conv2d(left + right, 6, 3, padding=1)
    return model


def shared_weight(c=8):
    """One weight in two layers."""

    def between(s, x):
        return s.again(F.relu(s.once(x)))

    model = Around(c, between, once=nn.Conv2d(c, c, 1), again=nn.Conv2d(c, c, 1))
    model.again.weight = model.once.weight
    return model


def between_convs(kind):
    """A third convolution, of class `kind`, between the two."""

    def build(c=8, d=8):
        model = Around(c, lambda s, x: s.conv(x), conv=kind(c, d, 3, padding=1))
        model.second = nn.Conv2d(d, 6, 3, padding=1)
        return model

    return build


def parametrized(c=8):
    """A weight of given lengths and directions."""
    model = Around(c, lambda s, x: F.relu(x))
    nn.utils.parametrizations.weight_norm(model.first)
    return model


def around(between, **parts):
    """Builds `Around` for any width; `parts` are functions of the width."""

    def build(c=8):
        made = {
            name: part(c) if callable(part) and not isinstance(part, nn.Module) else part
            for name, part in parts.items()
        }
        return Around(c, between, **copy.deepcopy(made))

    return build


def per_channel(c):
    return nn.Parameter(torch.ones(c, 1, 1))


C = {"c": "first.weight:0"}
FOLLOWED = {
    "layer norm of positions": around(lambda s, x: s.norm(x), norm=lambda c: nn.LayerNorm(16)),
    "layer norm of channels": around(lambda s, x: s.norm(x.transpose(1, 3)).transpose(1, 3), norm=nn.LayerNorm),
    "functional layer norm": around(
        lambda s, x: F.layer_norm(x.transpose(1, 3), (s.c,), s.g, s.g).transpose(1, 3),
        g=lambda c: nn.Parameter(torch.ones(c)),
    ),
    "learned parameter": around(lambda s, x: x * s.scale, scale=per_channel),
    "learned parameter in an expression": around(lambda s, x: x * s.scale.sigmoid() + s.scale, scale=per_channel),
    "constant view": around(lambda s, x: x.view(2, s.c, -1).view(2, s.c, 16, 16)),
    "view of a constant number of pixels": around(lambda s, x: x.view(-1, s.c * 256).view(-1, s.c, 16, 16)),
    "matrix product": around(lambda s, x: (x.flatten(2) @ x.flatten(2).transpose(1, 2)).mean() + x),
    "attention over channels": around(
        lambda s, x: (torch.softmax(x.flatten(2) @ x.flatten(2).mT, -1) @ x.flatten(2)).view_as(x)
    ),
    "python number": around(lambda s, x: x / int(x.size(1))),
    "root of a count": around(lambda s, x: x / x.shape[1] ** 0.5),
    "branch on channels": around(lambda s, x: x + 1 if x.shape[1] == s.c else x),
    "assertion on channels": around(lambda s, x: x if x.shape[1] == s.c and x.size(1) % s.c == 0 else 1 / 0),
    "functional conv": around(lambda s, x: F.conv2d(x, s.first.weight.mean(1, keepdim=True), groups=s.c, padding=1)),
    "tensor made for the channels": around(lambda s, x: x + torch.linspace(0, 1, 16) * x.new_ones(s.c, 1, 1)),
    "sum over channels": around(lambda s, x: x - x.mean(1, keepdim=True)),
    "running sum over channels": around(lambda s, x: x.cumsum(1)),
    "distances of positions": around(lambda s, x: x + torch.cdist(x.flatten(2).mT, x.flatten(2).mT).mean()),
    "in place": around(lambda s, x: x.mul_(2).add_(s.scale), scale=per_channel),
    "shared weight": shared_weight,
}
# The groups' first channels come first.
SHUFFLED = {
    "channel shuffle": around(lambda s, x: x.view(2, 2, -1, 16, 16).transpose(1, 2).reshape(2, -1, 16, 16)),
    "torch's channel shuffle": around(lambda s, x: s.shuffle(x), shuffle=lambda c: nn.ChannelShuffle(2)),
}
ARCHITECTURES = {
    **{name: Architecture(build, image(3, 16, 16), C) for name, build in FOLLOWED.items()},
    **{
        f"{kind.__name__} convolution": Architecture(between_convs(kind), image(3, 16, 16), {**C, "d": "conv.weight:0"})
        for kind in (Standardised, Rectified)
    },
    **{
        name: Architecture(build, image(3, 16, 16), C, dict.fromkeys(("first.weight:0", "first.bias:0"), blocks(2)))
        for name, build in SHUFFLED.items()
    },
    "parametrization": Architecture(parametrized, image(3, 16, 16), {"c": "first.bias:0"}),
    "channel slices": Architecture(
        sliced,
        image(3, 16, 16),
        {"a": "left.weight:1", "b": "right.weight:1", "left": "left.weight:0", "right": "right.weight:0"},
        {**dict.fromkeys(("first.weight:0", "first.bias:0"), side("a", "b")), "second.weight:1": side("left", "right")},
    ),
}


def converted(architecture):
    torch.manual_seed(0)
    model = architecture.build()
    randomise(model)
    model, inputs = model.double(), architecture.inputs(2)
    plain = copy.deepcopy(model)
    return model, plain, inputs, fastslim.convert(model, inputs, choices=RATIOS, divisor=1, seed=2)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_width_equals_a_network_built_that_narrow(name):
    architecture = ARCHITECTURES[name]
    model, plain, inputs, report = converted(architecture)
    mutator = report.mutator
    for choices in (mutator.max_choices, mutator.min_choices, *(mutator.sample_choices() for _ in range(4))):
        mutator.set_choices(choices)
        narrow, where = narrow_copy(architecture, plain, mutator, choices)
        assert_same(model, narrow, where, inputs)
    shape = dict(plain.named_parameters())
    for width, place in architecture.shown.items():
        key, dim = place.split(":")
        index = mutator.trace.index_of(key, mutator.min_choices)[int(dim)] if key in mutator.trace.tensors else None
        assert index is not None and len(index) < shape[key].shape[int(dim)], f"{width} stays full:\n{report}"
