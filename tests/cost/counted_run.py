"""Counts on a plain network while it runs: what a subnet costs, seen from the operators and not from a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# Convolutions and products with a weight; products of activations are bmm and attention.
COUNTED = ("convolution", "mm", "addmm")


@dataclass
class Memory:
    """A piece of memory an operator has made."""

    size: int
    made: int
    always: bool
    last: int = -1


@dataclass
class LiveBytes(TorchDispatchMode):
    """Notes for every operator whose memory it reads and makes.

    An operator in place that changes the whole of a piece counts as one that makes a new one, and results behind an
    operator's first one that nobody reads are its own business (the indices of a max-pool).
    """

    known: list[Any]
    step: int = 0
    pieces: list[Memory] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.keep: list[Tensor] = list(self.known)  # an address is used again when its tensor is gone
        self.of: dict[int, Memory | None] = {self.key(tensor): None for tensor in self.known}

    @staticmethod
    def key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def enter(self, tensor: Tensor, always: bool = True) -> Memory:
        piece = self.of[self.key(tensor)] = Memory(tensor.numel() * tensor.element_size(), self.step, always)
        self.pieces.append(piece)
        self.keep.append(tensor)
        return piece

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        writes = any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)
        if not writes and all(self.key(tensor) in self.of for tensor in made):
            return result  # views
        self.step += 1
        for tensor in given:
            piece = self.of.get(self.key(tensor))
            if piece is not None:
                piece.last = self.step
        for position, tensor in enumerate(made):
            old = self.of.get(self.key(tensor), Memory(-1, 0, True))
            if old is not None and old.size in (-1, tensor.numel() * tensor.element_size()):
                self.enter(tensor, always=position == 0)
        return result

    def peak(self, outputs: list[Tensor]) -> int:
        for tensor in outputs:
            piece = self.of.get(self.key(tensor))
            if piece is not None:
                piece.last = self.step + 1
        pieces = [piece for piece in self.pieces if piece.always or piece.last > piece.made]
        return max(
            sum(piece.size for piece in pieces if piece.made <= step <= max(piece.last, piece.made))
            for step in range(self.step + 1)
        )


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in an input or output."""
    if hasattr(value, "__dataclass_fields__"):
        value = vars(value)
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Attention as its parts: its fast path is one operator, which the counter does not know."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@torch.no_grad()
@without_fast_path()
def counted_run(model: nn.Module, inputs: Any) -> dict[str, int]:
    """Multiply-adds and peak of the activations of one sample, parameters, and bytes of parameters and buffers."""
    model.eval()
    arguments = {"kwargs": inputs} if isinstance(inputs, dict) else {"args": inputs}
    given = tensors_in(inputs)
    samples = given[0].shape[0]

    def run() -> Any:
        return model(*arguments.get("args", ()), **arguments.get("kwargs", {}))

    with FlopCounterMode(display=False) as flops:
        run()
    counts = {op.__name__.split(".")[0]: n for op, n in flops.get_flop_counts()["Global"].items()}
    saved = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    live = LiveBytes([*model.parameters(), *model.buffers()])
    for tensor in given:
        live.enter(tensor)
    with live:
        outputs = run()
    return dict(
        multiply_adds=sum(n for name, n in counts.items() if name in COUNTED) // 2 // samples,
        parameters=sum(p.numel() for p in model.parameters()),
        weight_bytes=sum(w.numel() * w.element_size() for w in saved.values()),
        peak_activation_bytes=-(-live.peak(tensors_in(outputs)) // samples),
    )
