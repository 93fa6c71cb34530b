"""An exponential moving average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """Averages of all floating-point parameters, kept beside the model.

    BN statistics are not averaged: they are calibrated before each evaluation.

    Args:
        model: whose parameters are averaged.
        decay: weight of the past; early steps use less, ``(1 + n) / (10 + n)``, to forget the random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the current weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.averages.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model computes with the averages inside the block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the weights and the averages, value by value, in the tensors the optimizer knows."""
        for name, parameter in self.parameters.items():
            weights = parameter.detach().clone()
            parameter.copy_(self.averages[name])
            self.averages[name].copy_(weights)

    def state_dict(self) -> dict[str, Tensor | int]:
        """The averages by parameter name, and the number of updates as ``"updates"``."""
        return {**self.averages, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Restores what `state_dict` returned."""
        self.updates = int(state["updates"])
        for name, average in self.averages.items():
            average.copy_(torch.as_tensor(state[name]))
