"""What a recording of forward consists of: one graph for every call of a module that is looked into."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

_TORCH = str(Path(torch.__file__).parent) + os.sep  # torchvision lies beside it
_HERE = str(Path(__file__).parents[1]) + os.sep


@dataclass(frozen=True)
class Guard:
    """Python code took a size, or a comparison of sizes, as a plain value; the recording holds while it is the same.

    Attributes:
        node: the size, or the comparison.
        value: what it was.
        location: file and line.
        compares: it decides what is computed; else Python computes with it, and what comes out is not followed.
    """

    node: fx.Node
    value: int | bool
    location: str
    compares: bool


@dataclass(eq=False)
class Frame:
    """One call of a module's own forward.

    The graph's nodes carry ``meta``: "location"; "shape" of a tensor; "value" of a number; "tensor", the full name of
    a parameter or buffer; "module", the full name of the module that is called; "outer", for an input, the node of
    another frame that it is; "inner", for an output of a module that was looked into, the node inside.

    Attributes:
        name: module path from the model; empty for the model itself.
        module: the module.
        graph: its own operations, and the calls of its children.
        training: the mode that was recorded.
        binding: how forward's arguments, by name, are nested.
        leaves: the bound arguments' leaves: nodes of the graph, or constants.
        guards: sizes that steered Python code.
        obstacles: why this recording cannot stand for the module's forward.
        children: frames of the modules called, by their nodes.
    """

    name: str
    module: nn.Module
    graph: fx.Graph
    training: bool = False
    binding: Any = None
    leaves: list[Any] = field(default_factory=list)
    guards: list[Guard] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    children: dict[fx.Node, Frame] = field(default_factory=dict)

    def walk(self) -> Iterator[Frame]:
        """This frame and all inside it, in the order of the calls."""
        yield self
        for child in self.children.values():
            yield from child.walk()


@dataclass
class Captured:
    """A recorded forward.

    Attributes:
        root: the frame of the model itself.
        model: the model; it is not changed.
        outputs: nodes of all tensors in what forward returned.
        training: the mode that was recorded.
        opaque: modules that were not looked into, and why.
    """

    root: Frame
    model: nn.Module
    outputs: list[fx.Node]
    training: bool
    opaque: dict[str, str]

    def frames(self) -> Iterator[Frame]:
        """All frames, in the order of the calls."""
        return self.root.walk()


def flatten_arguments(value: Any) -> tuple[list[Any], Any]:
    """All values in nested tuples, lists and dicts, and how they are nested (comparable, of plain values)."""
    kind: Any
    if isinstance(value, (tuple, list)):
        items, kind = list(value), (type(value).__name__, len(value))
    elif isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        items, kind = list(value.values()), (type(value).__name__, tuple(value))
    else:
        return [value], None
    parts = [flatten_arguments(item) for item in items]
    return [leaf for leaves, _ in parts for leaf in leaves], (kind, tuple(structure for _, structure in parts))


def user_location(frames: Iterator[tuple[str, int]]) -> str:
    """The first of the (file, line) pairs that is neither torch's nor this package's, as ``file:line``."""
    for filename, line in frames:
        if not filename.startswith((_TORCH, _HERE, "<")):
            return f"{filename}:{line}"
    return "unknown line"


def here() -> str:
    """The line of user code that is running."""

    def stack() -> Iterator[tuple[str, int]]:
        frame = sys._getframe(2)
        while frame is not None:
            yield frame.f_code.co_filename, frame.f_lineno
            frame = frame.f_back

    return user_location(stack())
