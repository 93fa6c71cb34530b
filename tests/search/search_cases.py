"""A small supernet, its data, and the plain definition of its score: functional calls on sliced weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastslim

BATCHES, BATCH, CLASSES = 2, 24, 3


class ToyNet(nn.Module):
    """Two blocks, the second one a residual one, and a classifier: three units, one of them shared by an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.first_bn = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.inner_bn = nn.BatchNorm2d(12)
        self.outer = nn.Conv2d(12, 8, 3, padding=1, bias=False)
        self.outer_bn = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 6, 6) -> (N, classes)."""
        x = F.relu(self.first_bn(self.first(x)))
        y = F.relu(self.inner_bn(self.inner(x)))
        x = F.relu(x + self.outer_bn(self.outer(y)))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


def toy_data(batches: int = BATCHES, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Batches of noisy images, bright at the top, in the middle or at the bottom."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(batches):
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        images = torch.randn(BATCH, 1, 6, 6, generator=generator)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[0, 2 * label : 2 * label + 2] += 0.7
        result.append((images, labels))
    return result


def toy_algo(seed: int = 0, steps: int = 12, **options: object) -> fastslim.AutoSlim:
    """A supernet after a few steps, so that widths matter."""
    torch.manual_seed(seed)
    options = {"choices": [0.25, 0.5, 0.75, 1.0], "divisor": 2, "seed": seed, **options}
    algo = fastslim.AutoSlim(architecture=ToyNet(), example_inputs=torch.randn(2, 1, 6, 6), **options)
    optimizer = torch.optim.SGD(algo.parameters(), lr=0.05, momentum=0.9)
    for batch in toy_data(steps, seed=2):
        algo.train_step(batch, optimizer)
    return algo


def plain_logits(net: ToyNet, x: Tensor, a: int, b: int, c: int) -> Tensor:
    """The network with `a` channels around the addition, `b` inside and `c` at the end; batch statistics."""

    def bn(layer: nn.BatchNorm2d, x: Tensor, channels: int) -> Tensor:
        return F.batch_norm(x, None, None, layer.weight[:channels], layer.bias[:channels], training=True, eps=layer.eps)

    x = F.relu(bn(net.first_bn, F.conv2d(x, net.first.weight[:a], padding=1), a))
    y = F.relu(bn(net.inner_bn, F.conv2d(x, net.inner.weight[:b, :a], padding=1), b))
    x = F.relu(x + bn(net.outer_bn, F.conv2d(y, net.outer.weight[:a, :b], padding=1), a))
    x = F.relu(F.conv2d(x, net.last.weight[:c, :a], net.last.bias[:c], padding=1))
    return F.linear(x.mean((2, 3)), net.head.weight[:, :c], net.head.bias)


def plain_multiply_adds(a: int, b: int, c: int) -> int:
    """By hand: 36 positions, kernels of 9, and the classifier."""
    return 36 * 9 * (a + a * b + b * a + a * c) + c * CLASSES


def snapshot(algo: fastslim.AutoSlim) -> tuple[dict[str, int], dict[str, bool], dict[str, Tensor]]:
    """Widths, modes and every tensor of an algorithm."""
    return (
        algo.mutator.current_choices,
        {name: module.training for name, module in algo.named_modules()},
        {name: value.clone() for name, value in algo.state_dict().items()},
    )


def assert_unchanged(algo: fastslim.AutoSlim, before: tuple[dict, dict, dict]) -> None:
    """Nothing of an algorithm differs from its snapshot."""
    choices, modes, tensors = snapshot(algo)
    assert choices == before[0]
    assert modes == before[1]
    for name, value in tensors.items():
        assert torch.equal(value, before[2][name]), name
