"""Networks with a stem, and the comparison of a step that shares it with one that does not."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from test_exactness import assert_equal_to_rounding, gradients
from torch import Tensor, nn

import fastslim
from fastslim.algorithms import SlimmableNetwork

LABELS = torch.tensor([1, 2, 3, 4, 5, 6])


class Small(nn.Module):
    """conv -> BN -> ReLU -> pool, then a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.MaxPool2d(2)
        self.body, self.body_norm, self.fc = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.norm(self.conv(x))))
        return self.fc(F.relu(self.body_norm(self.body(x)) + x).mean((2, 3)))


SMALL = "stem shared by all passes: conv, norm, relu, pool"


def small(**options) -> fastslim.AutoSlim:
    torch.manual_seed(0)
    net = Small().double()
    nn.init.normal_(net.norm.running_mean)
    return fastslim.AutoSlim(architecture=net, example_inputs=images()[:1], divisor=4, seed=1, **options)


def images(size: int = 12) -> Tensor:
    return torch.randn(6, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def unshared(algo: fastslim.AutoSlim) -> fastslim.AutoSlim:
    """A copy whose passes run everything; it draws the same widths."""
    other = copy.deepcopy(algo)
    other.share_stem = False
    return other


def everything(algo: nn.Module, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**losses, **{f"grad.{k}": v for k, v in gradients(algo).items()}, **dict(algo.named_buffers())}


def assert_same_step(algo, batch=None, step=None, shared: bool = True, copies=None) -> None:
    """Two steps, the second on top of the first, with and without a shared stem; says that it was shared."""
    batch = (images(), LABELS) if batch is None else batch
    other = unshared(algo) if copies is None else copies
    algo.zero_grad()  # which the copy has none of
    for _ in range(2):
        results = [(step or (lambda a: a.accumulate(batch)))(each) for each in (algo, other)]
        assert_equal_to_rounding(everything(algo, results[0]), everything(other, results[1]))
    assert any(line.startswith("stem shared by all passes") for line in algo.plan_report) == shared, algo.plan_report
    assert "stem not shared: share_stem=False" in other.plan_report
    assert algo._plan.shared is None


def listed(algo_class=SlimmableNetwork, **options) -> SlimmableNetwork:
    torch.manual_seed(0)
    return algo_class(Small().double(), example_inputs=images()[:1], **options)
