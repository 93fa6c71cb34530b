"""What is known of the values in a recorded forward, and how rules read its nodes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fastslim.graph.frame import Frame
from fastslim.graph.parts import Parts

Dim = Parts | None  # None: full at any width


@dataclass(frozen=True)
class Layout:
    """What is known of a tensor: the parts along each of its dimensions."""

    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class Size:
    """A number: the active entries of `parts`, divided (rounding down) by `divisor`.

    When it is not exact, it depends on the parts in a way that is not followed.
    """

    parts: Parts
    divisor: int = 1
    exact: bool = True


# A tensor, a number, several values, or None (nothing here depends on a width).
Known = Layout | Size | tuple | None


@dataclass
class LayerDraft:
    """A layer while the graph is analysed; see LayerSpec."""

    name: str
    kind: str
    module: nn.Module
    inputs: Parts
    out: Parts
    heads: Parts = ()
    key: Parts = ()
    value: Parts = ()
    positions: int = 0


@dataclass(frozen=True)
class Want:
    """An argument that must be the active count of `parts` (or a fixed number) at any width."""

    frame: Frame
    node: fx.Node
    path: tuple[Any, ...]
    parts: Parts
    given: Known
    value: Any


@dataclass
class Axes:
    """The parts along each dimension of a parameter, buffer or other stored tensor."""

    tensor: Tensor
    name: str
    dims: list[Dim]


def parts_of(known: Known) -> Iterator[Parts]:
    """All parts in a value, however nested."""
    if isinstance(known, tuple):
        for value in known:
            yield from parts_of(value)
    elif isinstance(known, Layout):
        yield from (dim for dim in known.dims if dim is not None)
    elif isinstance(known, Size):
        yield known.parts


def shape_of(argument: Any) -> tuple[int, ...]:
    """The shape of a tensor argument in the recorded run; () for anything else."""
    return argument.meta.get("shape", ()) if isinstance(argument, fx.Node) else ()


def name_of(node: fx.Node) -> str:
    """The name of the method or function a node calls."""
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def is_tensor(argument: Any) -> bool:
    """Whether the argument is a node whose value is one tensor."""
    return isinstance(argument, fx.Node) and "shape" in argument.meta


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or keyword."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def argument_at(node: fx.Node, path: Sequence[Any]) -> Any:
    """The argument at ``(position or keyword, index, ...)``."""
    value: Any = node.args[path[0]] if isinstance(path[0], int) else node.kwargs[path[0]]
    for key in path[1:]:
        value = getattr(value, key) if isinstance(key, str) else value[key]
    return value


def number_paths(node: fx.Node) -> Iterator[tuple[tuple[Any, ...], fx.Node]]:
    """The computed numbers among a node's arguments, and where they stand."""
    for key, value in (*enumerate(node.args), *node.kwargs.items()):
        if isinstance(value, fx.Node) and "value" in value.meta:
            yield (key,), value
        elif isinstance(value, (tuple, list)):
            for index, item in enumerate(value):
                if isinstance(item, fx.Node) and "value" in item.meta:
                    yield (key, index), item


def number(value: Any) -> Any:
    """A number argument as it was in the recorded run."""
    return value.meta.get("value") if isinstance(value, fx.Node) else value


def describe(node: fx.Node, module: nn.Module | None = None) -> str:
    """How the report calls a node: ``layer1.norm (LayerNorm)`` or ``torch.matmul``."""
    if module is not None:
        return f"{node.meta['module']} ({type(module).__name__})"
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    return getattr(node.target, "__name__", str(node.target))


def product(sizes: Iterable[int]) -> int:
    """Of sizes; 1 when there are none."""
    return math.prod(sizes)
