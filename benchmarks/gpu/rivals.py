"""The sandwich step as others compute it: boolean masks, clean slices, slices under torch.compile, and a plain step.

Every side is a function that makes one optimizer step; all start from copies of one model.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastslim
from fastslim import models

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
import plain_loop

Widths = dict[str, int]
Step = Callable[[], list[Tensor]]
FORWARDS = {
    "resnet50": plain_loop.resnet50,
    "mobilenet_v2": partial(plain_loop.mobilenet_v2, small_images=False),
}


class Workload(NamedTuple):
    """What every side of the comparison computes.

    Attributes:
        model: full-width network that is copied, on its device, in channels_last, without dropout.
        forward: the same network over `plain_loop.Net`.
        batches: (images, labels) used by turns.
        fixed: output channels of every layer of the max and the min subnet.
        randoms: of random subnets, two per step, used by turns.
        dtype: of autocast.
    """

    model: nn.Module
    forward: plain_loop.Forward
    batches: list[tuple[Tensor, Tensor]]
    fixed: list[Widths]
    randoms: list[Widths]
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        """The context all sides compute in."""
        return torch.autocast(self.batches[0][0].device.type, self.dtype)

    def turns(self) -> Callable[[], tuple[tuple[Tensor, Tensor], list[Widths]]]:
        """A function that gives the batch and the subnets of the next step."""
        batches, pairs = itertools.cycle(self.batches), itertools.cycle(range(0, len(self.randoms), 2))

        def following() -> tuple[tuple[Tensor, Tensor], list[Widths]]:
            index = next(pairs)
            return next(batches), [*self.fixed, *self.randoms[index : index + 2]]

        return following


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """The same for all sides."""
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)


def prepare(
    name: str, batch: int, pixels: int, device: torch.device, dtype: torch.dtype, width: float = 1.0, subnets: int = 8
) -> tuple[Workload, fastslim.AutoSlim, list[dict[str, int]]]:
    """The workload of a network, its AutoSlim, and the choices of the workload's random subnets."""
    torch.manual_seed(0)
    model = getattr(models, name)(width_mult=width).to(device, memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batches = [
        (
            torch.randn(batch, 3, pixels, pixels, device=device).contiguous(memory_format=torch.channels_last),
            torch.randint(1000, (batch,), device=device),
        )
        for _ in range(2)
    ]
    algo = fastslim.AutoSlim(architecture=copy.deepcopy(model), example_inputs=batches[0][0][:1], seed=0)
    layers = {n: m for n, m in algo.architecture.named_modules() if hasattr(m, "active_out")}
    randoms = [algo.sample_subnet() for _ in range(subnets)]

    def widths(choices: dict[str, int]) -> Widths:
        algo.set_subnet(choices)
        return {n: layer.active_out for n, layer in layers.items()}

    fixed = [widths(algo.mutator.max_choices), widths(algo.mutator.min_choices)]
    load = Workload(model, FORWARDS[name], batches, fixed, [widths(choices) for choices in randoms], dtype)
    algo.set_subnet(algo.mutator.max_choices)
    return load, algo, randoms


def ours(load: Workload, algo: fastslim.AutoSlim, randoms: list[dict[str, int]], **options: bool) -> Step:
    """AutoSlim.train_step.

    Args:
        load: what is computed.
        algo: copied.
        randoms: choices of the random subnets.
        **options: of AutoSlim, `cuda_graphs` and `overlap_students`.
    """
    own = copy.deepcopy(algo)
    for name, value in options.items():
        setattr(own, name, value)
    optimizer, following, choices = optimizer_of(own), load.turns(), itertools.cycle(randoms)
    own.sample_subnet = lambda: next(choices)

    def step() -> list[Tensor]:
        batch, _ = following()
        with load.autocast():
            return list(own.train_step(batch, optimizer).values())

    return step


def plain(load: Workload) -> Step:
    """Forward, backward and optimizer of the full-width network."""
    net = copy.deepcopy(load.model)
    optimizer, following = optimizer_of(net), load.turns()

    def step() -> list[Tensor]:
        (images, labels), _ = following()
        optimizer.zero_grad()
        with load.autocast():
            loss = F.cross_entropy(net(images).float(), labels)
        loss.backward()
        optimizer.step()
        return [loss.detach()]

    return step


def slices(load: Workload, kind: type[plain_loop.Net] = plain_loop.Net) -> Step:
    """`weight[:o, :i]`, network by network."""
    net = copy.deepcopy(load.model)
    view, optimizer, following = kind(net), optimizer_of(net), load.turns()

    def step() -> list[Tensor]:
        (images, labels), subnets = following()
        optimizer.zero_grad()
        with load.autocast():
            losses = plain_loop.sandwich_passes(view, load.forward, images, labels, subnets)
        optimizer.step()
        return losses

    return step


class Masks(plain_loop.Net):
    """Active channels as boolean masks of full size, which index the weights in every forward (MMRazor 1.0.0's way)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._masks: dict[tuple[int, int], Tensor] = {}

    def _mask(self, like: Tensor, size: int, count: int) -> Tensor:
        # Made once: only the indexing is charged.
        key = size, count
        if key not in self._masks:
            self._masks[key] = torch.arange(size, device=like.device) < count
        return self._masks[key]

    def conv(
        self, name: str, x: Tensor, stride: int = 1, padding: int = 0, columns: list[slice] | None = None
    ) -> Tensor:
        weight = self.tensors[f"{name}.weight"]
        rows = self._mask(weight, weight.shape[0], self.widths[name])
        active = weight[rows][:, self._mask(weight, weight.shape[1], x.shape[1])]
        return F.conv2d(x, active, None, stride, padding)

    def grouped(self, name: str, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        weight = self.tensors[f"{name}.weight"]
        active = weight[self._mask(weight, weight.shape[0], self.widths[name])]
        return F.conv2d(x, active, None, stride, padding, groups=x.shape[1] // weight.shape[1])

    def norm(self, name: str, x: Tensor) -> Tensor:
        full = [self.tensors[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        mask = self._mask(x, full[0].shape[0], x.shape[1])
        mean, var, weight, bias = (vector[mask] for vector in full)
        y = F.batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-5)
        for statistics, updated in zip(full[:2], (mean, var), strict=True):
            statistics.masked_scatter_(mask, updated)
        return y

    def linear(self, name: str, x: Tensor) -> Tensor:
        weight = self.tensors[f"{name}.weight"]
        active = weight[:, self._mask(weight, weight.shape[1], x.shape[1])]
        return F.linear(x, active, self.tensors[f"{name}.bias"])


class _Conv2d(nn.Conv2d):
    """Slices its weight by an integer attribute and the input's channels."""

    width: int

    def forward(self, x: Tensor) -> Tensor:
        if self.groups > 1:
            return F.conv2d(x, self.weight[: x.shape[1]], None, self.stride, self.padding, groups=x.shape[1])
        return F.conv2d(x, self.weight[: self.width, : x.shape[1]], None, self.stride, self.padding)


class _BatchNorm2d(nn.BatchNorm2d):
    """Slices by the input's channels."""

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        mean, var, weight, bias = self.running_mean[:c], self.running_var[:c], self.weight[:c], self.bias[:c]
        return F.batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-5)


class _Linear(nn.Linear):
    """Slices by the input's features."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[:, : x.shape[1]], self.bias)


class Compiled:
    """The network with layers that slice themselves, under torch.compile with dynamic widths and batch size.

    Args:
        model: full-width network; copied.
    """

    def __init__(self, model: nn.Module) -> None:
        torch._dynamo.config.allow_unspec_int_on_nn_module = True
        self.net = copy.deepcopy(model)
        slicing = {nn.Conv2d: _Conv2d, nn.BatchNorm2d: _BatchNorm2d, nn.Linear: _Linear}
        for module in self.net.modules():
            module.__class__ = slicing.get(type(module), type(module))
        self.layers = {name: module for name, module in self.net.named_modules() if isinstance(module, _Conv2d)}
        self.run = torch.compile(self.net)

    def step(self, load: Workload) -> Step:
        """Steps on a workload of the same network, from its weights."""
        self.net.load_state_dict(load.model.state_dict())
        optimizer, following = optimizer_of(self.net), load.turns()
        for images, _ in load.batches:
            torch._dynamo.maybe_mark_dynamic(images, 0)

        def step() -> list[Tensor]:
            (images, labels), subnets = following()
            optimizer.zero_grad()
            losses: list[Tensor] = []
            teacher = None
            for widths in subnets:
                for name, layer in self.layers.items():
                    layer.width = widths[name]
                with load.autocast():
                    logits = self.run(images).float()
                if teacher is None:
                    loss, teacher = F.cross_entropy(logits, labels), F.softmax(logits.detach(), 1)
                else:
                    loss = F.kl_div(F.log_softmax(logits, 1), teacher, reduction="batchmean")
                loss.backward()
                losses.append(loss.detach())
            optimizer.step()
            return losses

        return step
