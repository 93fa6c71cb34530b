"""What the zoo says about a network: its widths, how they cut its parameters, what it is called with.

Every network takes its widths as keyword arguments, so that the same class builds the narrow network a subnet must
equal. How a narrow network's parameters lie in the full one is stated by hand, in ignorance of the analyser.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

Widths = Mapping[str, int]
# (size of the full dimension, of the narrow one, full widths, narrow widths) -> indices of the full dimension
Cut = Callable[[int, int, Widths, Widths], list[int]]
ZOO: dict[str, Architecture] = {}


def first(full: int, narrow: int, wide: Widths, widths: Widths) -> list[int]:
    """The first entries: how a dimension is cut where nothing else is said."""
    return list(range(narrow))


def blocks(count: int) -> Cut:
    """`count` equal blocks one after another, the first entries of each (fused q, k, v; gates)."""

    def cut(full: int, narrow: int, wide: Widths, widths: Widths) -> list[int]:
        return [block * (full // count) + i for block in range(count) for i in range(narrow // count)]

    return cut


def side(*parts: int | str | tuple[str, int]) -> Cut:
    """Parts side by side, the first entries of each: a width, (width, entries for each), or a number (always whole)."""

    def cut(full: int, narrow: int, wide: Widths, widths: Widths) -> list[int]:
        index: list[int] = []
        start = 0
        for part in parts:
            name, factor = (part, 1) if isinstance(part, str) else part if isinstance(part, tuple) else ("", part)
            index += range(start, start + widths.get(name, 1) * factor)
            start += wide.get(name, 1) * factor
        assert (start, len(index)) == (full, narrow), f"parts {parts} do not make up {narrow} of {full}"
        return index

    return cut


@dataclass(frozen=True)
class Architecture:
    """A network and what must hold of it.

    Attributes:
        build: the class; its keyword arguments are the widths, their defaults the full ones.
        inputs: inputs for a batch of that many samples: a tuple of arguments, or a dict of keywords.
        shown: where each width that must be slimmable can be read: ``"fc.weight:0"`` is the size of dimension 0,
            ``"proj.weight:1/4"`` a fourth of it, ``"a.weight:0 - b.weight:1"`` a difference.
        cuts: how dimensions are cut that do not take their first entries, by ``"pattern:dim"``.
        full: dimensions that stay at full width.
        units: how many mutable units there are; as many as widths unless said otherwise, 0 for not counted.
        classifies: whether the output is a tensor of logits.
    """

    build: Callable[..., nn.Module]
    inputs: Callable[[int], Any]
    shown: Mapping[str, str]
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    full: tuple[str, ...] = ()
    units: int | None = None
    classifies: bool = True

    @property
    def full_widths(self) -> dict[str, int]:
        """The widths of the full network."""
        return {name: p.default for name, p in inspect.signature(self.build).parameters.items()}

    def widths(self, size: Callable[[str, int], int]) -> dict[str, int]:
        """The network's own widths, when dimension `dim` of tensor `name` has `size(name, dim)` active entries."""

        def read(place: str) -> int:
            name, _, dim = place.strip().partition(":")
            dim, _, divisor = dim.partition("/")
            entries = size(name, int(dim))
            assert entries % int(divisor or 1) == 0, f"{place}: {entries} active entries"
            return entries // int(divisor or 1)

        return {
            width: read(place.split(" - ")[0]) - sum(map(read, place.split(" - ")[1:]))
            for width, place in self.shown.items()
        }

    def narrow(self, widths: Widths) -> nn.Module:
        """The network built with these widths."""
        model = self.build(**widths)
        for module in model.modules():  # forwards with literal numbers have a twin without
            if hasattr(module, "narrow_forward"):
                module.forward = module.narrow_forward
        return model

    def index(self, name: str, full: torch.Size, narrow: torch.Size, widths: Widths) -> list[list[int]]:
        """Which entries of each dimension of the full tensor `name` the narrow network holds."""
        wide = self.full_widths
        found = []
        for dim, (size, small) in enumerate(zip(full, narrow, strict=True)):
            cut = next((c for key, c in self.cuts.items() if fnmatch(f"{name}:{dim}", key)), first)
            found.append(cut(size, small, wide, {**wide, **widths}))
        return found


def architecture(inputs: Callable[[int], Any], shown: Mapping[str, str], cuts: Any = None, **expected: Any) -> Any:
    """Takes the decorated network into the zoo; the arguments are those of :class:`Architecture`."""

    def enter(cls: type[nn.Module]) -> type[nn.Module]:
        ZOO[cls.__name__] = Architecture(cls, inputs, shown, cuts or {}, **expected)
        return cls

    return enter


def image(*shape: int) -> Callable[[int], tuple[torch.Tensor, ...]]:
    """Random inputs of this shape behind the batch."""
    return lambda batch: (torch.randn(batch, *shape, dtype=torch.float64),)


def randomise(model: nn.Module) -> None:
    """Gives constants (norms, scales, statistics) random values, so that a wrong index shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and (parameter.dim() < 2 or parameter.std() == 0):
                parameter.add_(0.25 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.uniform_(-0.1, 0.1)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)


def make(name: str, batch: int = 2) -> tuple[nn.Module, Any]:
    """(full network in float64 with random weights and statistics, random inputs)."""
    torch.manual_seed(0)
    model = ZOO[name].build()
    randomise(model)
    return model.double(), ZOO[name].inputs(batch)
