"""The steps that are compared: of the sandwich rule and of the plain network, on the same data."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastslim.algorithms import AutoSlim
from fastslim.algorithms.slimmable import Choices
from fastslim.algorithms.task_loss import logits_of
from fastslim.bench.interleave import Run, quickest

#: By name; a step runs in the one that is faster for it.
FORMATS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}


class Draws:
    """Random subnets, drawn anew for every step and the same for all who ask for the same step.

    Libraries make code for shapes they have not met, and a training meets new ones all the time: subnets that come
    again would time something else.

    Args:
        algo: how they are drawn, and how many a step.
    """

    def __init__(self, algo: AutoSlim) -> None:
        self._algo = algo
        self._drawn: list[list[Choices]] = []

    def of_step(self, index: int) -> list[Choices]:
        """Those of a step, counted from 0."""
        while len(self._drawn) <= index:
            self._drawn.append([self._algo.sample_subnet() for _ in range(self._algo.num_samples)])
        return self._drawn[index]

    def in_turn(self) -> Iterator[Choices]:
        """One after the other, from step 0 on."""
        return (choices for index in itertools.count() for choices in self.of_step(index))

    def multiply_adds(self) -> list[float]:
        """Of each step drawn so far: those of all its passes, as a multiple of the full network's."""
        count = {key: self._algo.subnet_cost(value).multiply_adds for key, value in self._ends().items()}
        random = [[self._algo.subnet_cost(choices).multiply_adds for choices in step] for step in self._drawn or [[]]]
        return [(count["max"] + count["min"] + sum(step)) / count["max"] for step in random]

    def _ends(self) -> dict[str, Choices]:
        return {"max": self._algo.mutator.max_choices, "min": self._algo.mutator.min_choices}


@dataclass
class Task:
    """What is trained, and on what.

    Attributes:
        network: the plain network.
        algo: the same as a supernet, with the same weights; neither is changed.
        inputs: what forward is called with: a tensor, a tuple or a dict of keyword arguments.
        targets: class indices for its logits.
        dtype: float32, or what autocast computes in.
        draws: the random subnets of all sides.
    """

    network: nn.Module
    algo: AutoSlim
    inputs: Any
    targets: Tensor
    dtype: torch.dtype = torch.float32
    draws: Draws = field(init=False)

    def __post_init__(self) -> None:
        self.draws = Draws(self.algo)

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast, where it is asked for."""
        return torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32)

    def part(self, count: int) -> tuple[Any, Tensor]:
        """The first samples of the batch."""
        return each_tensor(self.inputs, lambda value: value[:count]), self.targets[:count]


@dataclass
class Side:
    """A network, and one step of its training."""

    network: nn.Module
    step: Run


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with momentum, by torch's loop or its fused kernel, whichever is faster for these parameters.

    On a CPU the fused kernel is up to 2 times faster, but it lays out gradients in channels_last once more for nothing
    (torch 2.13), which makes it slower for 3x3 convolutions.
    """
    trained = [p for p in parameters if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
    rivals = [torch.optim.SGD(trained, lr=1e-4, momentum=0.9, fused=fused) for fused in (True, False)]
    fused = quickest([rival.step for rival in rivals], rounds=5) == 0
    for p in trained:
        p.grad = None
    return torch.optim.SGD(trained, lr=1e-4, momentum=0.9, fused=fused)


def plain_side(task: Task, memory_format: torch.memory_format) -> Side:
    """Forward, backward and optimizer of the full network, as one writes them in torch."""
    network, inputs = in_format(task, task.network, memory_format)
    optimizer = sgd(network.parameters())

    def step() -> None:
        optimizer.zero_grad()
        with task.precision():
            loss = F.cross_entropy(logits_of(call(network, inputs)).float(), task.targets)
        loss.backward()
        optimizer.step()

    return Side(network, step)


def sandwich_side(task: Task, memory_format: torch.memory_format) -> Side:
    """`AutoSlim.train_step` on the task's draws."""
    algo, inputs = in_format(task, task.algo, memory_format)
    optimizer, draws = sgd(algo.parameters()), task.draws.in_turn()
    algo.sample_subnet = lambda: next(draws)

    def step() -> None:
        with task.precision():
            algo.train_step((inputs, task.targets), optimizer)

    return Side(algo, step)


def in_format(task: Task, module: nn.Module, memory_format: torch.memory_format) -> tuple[Any, Any]:
    """A copy of the module in training mode, and the inputs, both in a memory format."""

    def converted(value: Tensor) -> Tensor:
        return value.contiguous(memory_format=memory_format) if value.dim() == 4 else value

    own = copy.deepcopy(module).to(memory_format=memory_format)  # type: ignore[call-overload]
    return own.train(), each_tensor(task.inputs, converted)


def call(network: nn.Module, inputs: Any) -> Any:
    """The network's output."""
    if isinstance(inputs, Mapping):
        return network(**inputs)
    return network(*inputs) if isinstance(inputs, (tuple, list)) else network(inputs)


def each_tensor(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same inputs with every tensor changed."""
    return torch.utils._pytree.tree_map_only(Tensor, change, inputs)


def in_faster_format(make: Callable[[torch.memory_format], Side]) -> tuple[Side, str]:
    """A side in the memory format that is faster for it, and the format's name."""
    sides = {name: make(memory_format) for name, memory_format in FORMATS.items()}
    name = list(sides)[quickest([side.step for side in sides.values()])]
    return sides[name], name
