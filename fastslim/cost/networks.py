"""Whole networks: exported subnets to time, and how their times follow from those of their layers."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastslim.cost.place import Place
from fastslim.mutators import ChannelMutator
from fastslim.mutators.plain_copy import plain_copy

#: Where between the narrowest (0) and the widest (1) the uniform subnets lie that are timed as a whole.
POSITIONS = (0.0, 0.5, 1.0)


class Networks:
    """The subnets of a supernet as plain networks that run somewhere.

    Args:
        mutator: of the supernet, which stays as it is.
        place: where they run.
    """

    def __init__(self, mutator: ChannelMutator, place: Place) -> None:
        self.mutator, self.place = mutator, place

    def uniform(self) -> list[dict[str, int]]:
        """One subnet for each of `POSITIONS`."""
        units = self.mutator.mutable_units
        low = min((unit.candidate_widths[0] / unit.num_channels for unit in units), default=1.0)
        return [self.mutator.uniform_choices(low + (1 - low) * position) for position in POSITIONS]

    def random(self, rng: random.Random, position: float) -> dict[str, int]:
        """Widths around a common ratio: of independent ones nearly all subnets would be equally fast."""
        subnet = {}
        for unit in self.mutator.mutable_units:
            low = unit.candidate_widths[0] / unit.num_channels
            near = unit.nearest_width(low + (1 - low) * position)
            place, spread = unit.candidate_widths.index(near), max(1, len(unit.candidate_widths) // 4)
            subnet[unit.name] = rng.choice(unit.candidate_widths[max(0, place - spread) : place + spread + 1])
        return subnet

    def call(self, subnet: Mapping[str, Any]) -> Callable[[], Any]:
        """One inference of the exported subnet with the example inputs.

        Raises:
            FastslimValueError: when subnet does not fit.
        """
        before = self.mutator.current_choices
        self.mutator.set_choices({**self.mutator.max_choices, **subnet})
        try:
            model = self.place.moved(plain_copy(self.mutator))
        finally:
            self.mutator.set_choices(before)
        inputs = {name: self._input(value) for name, value in self.mutator.trace.example_inputs.items()}

        def run() -> Any:
            with torch.inference_mode():
                return model(**inputs)

        return run

    def _input(self, value: Any) -> Any:
        """An example input, for the table's batch size and data type."""

        def made(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            samples = self.mutator.trace.forward.samples
            if leaf.dim() and leaf.shape[0] % samples == 0:
                size = leaf.shape[0] // samples * self.place.batch_size
                leaf = leaf[torch.arange(size, device=leaf.device) % leaf.shape[0]]
            if leaf.is_meta:
                leaf = torch.zeros(leaf.shape, dtype=leaf.dtype)
            moved = leaf.to(self.place.device, self.place.dtype if leaf.is_floating_point() else None)
            return self.place.laid_out(moved)

        return torch.utils._pytree.tree_map(made, value)


def fitted(sums: Sequence[float], whole: Sequence[float]) -> tuple[float, float]:
    """Factor and constant, neither below 0, that bring sums of layers nearest to whole networks, relatively."""
    rows = [(own / time, 1 / time) for own, time in zip(sums, whole, strict=True)]
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (sum(row[i] for row in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    if determinant > 1e-12 * aa * bb:
        factor, constant = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
        if factor > 0 and constant >= 0:
            return factor, constant
    return a / aa, 0.0
