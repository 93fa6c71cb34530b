"""Networks after one training step on digits, calibrated for their subnets."""

import functools
from types import SimpleNamespace

import torch
from graph.rewritten_nets import Scaled
from torch import nn

import fastslim
from fastslim.data.digits import digits

WIDTHS = (0.25, 0.5, 1.0)


class Concat(nn.Module):
    """Two branches side by side, with padding that convolution alone cannot do."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, padding_mode="reflect", bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.left, self.right = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 24, 1)
        self.left_norm = nn.BatchNorm2d(16)
        self.join, self.join_norm = nn.Conv2d(56, 32, 1), nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, images):
        x = torch.relu(self.norm(self.stem(images)))
        x = torch.cat([self.left_norm(self.left(x)).relu(), self.right(x), x], 1)
        return self.head(torch.relu(self.join_norm(self.join(x))).mean((2, 3)))


class Rewritten(nn.Module):
    """A module inside mentions its channel count, so that narrow widths run another forward."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.scaled = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), Scaled(16)
        self.last = nn.Linear(16, 10)

    def forward(self, x):
        return self.last(self.scaled(self.norm(self.first(x))).relu().mean((2, 3)))


BUILDS = {
    "resnet18": lambda: fastslim.models.resnet18(num_classes=10, in_channels=1, small_images=True, width_mult=0.25),
    "mobilenet_v2": lambda: fastslim.models.mobilenet_v2(
        num_classes=10, in_channels=1, small_images=True, width_mult=0.25
    ),
    "concat": Concat,
    "rewritten": Rewritten,
}
NETS = sorted(BUILDS)


@functools.cache
def digit_batch(dtype=torch.float32):
    images, labels = zip(*[digits_set()[i] for i in range(64)], strict=True)
    return torch.stack(images).to(dtype), torch.tensor(labels)


@functools.cache
def digits_set():
    return digits()[0]


def trained(name, dtype=torch.float32):
    """A fresh supernet in evaluation mode after one step: algo, images, subnets by ratio, the half subnet, build."""
    torch.manual_seed(0)
    images, labels = digit_batch(dtype)
    net = BUILDS[name]().to(dtype)
    algo = fastslim.AutoSlim(
        architecture=net, example_inputs=images[:2], choices=WIDTHS, divisor=4, random_widths="uniform", seed=0
    )
    algo.train_step((images, labels), torch.optim.SGD(algo.parameters(), lr=0.05))
    subnets = {ratio: algo.uniform_subnet(ratio) for ratio in WIDTHS}
    fastslim.calibrate_batch_norm(algo, [(images, labels)], list(subnets.values()))
    build = functools.partial(_of_dtype, name, dtype)
    return SimpleNamespace(algo=algo.eval(), images=images, subnets=subnets, half=subnets[0.5], build=build)


def _of_dtype(name, dtype):
    return BUILDS[name]().to(dtype)


# For tests that leave it as it is.
shared = functools.cache(trained)
