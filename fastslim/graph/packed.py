"""Recorded graphs as lists of plain values that can be pickled."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True)
class _Reference:
    """Stands for a node."""

    name: str


@dataclass(frozen=True)
class _Function:
    """Stands for a function that pickle does not find: torch makes some inside of others."""

    module: str
    name: str


def pack_graph(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """The nodes of a graph, without their ``meta``."""

    def packed(value: Any) -> Any:
        def reference(node: fx.Node) -> Any:
            return _Reference(node.name)

        return fx.node.map_arg(value, reference)

    return [(node.op, _target(node), packed(node.args), packed(node.kwargs), node.name) for node in graph.nodes]


def _target(node: fx.Node) -> Any:
    if node.op == "call_function" and "<locals>" in getattr(node.target, "__qualname__", ""):
        return _Function(node.target.__module__, node.target.__name__)
    return node.target


def unpack_graph(nodes: list[tuple[Any, ...]]) -> fx.Graph:
    """What `pack_graph` has packed."""
    graph = fx.Graph()
    found: dict[str, fx.Node] = {}

    def unpacked(value: Any) -> Any:
        def node(leaf: Any) -> Any:
            return found[leaf.name] if isinstance(leaf, _Reference) else leaf

        return fx.node.map_aggregate(value, node)

    for op, target, args, kwargs, name in nodes:
        if isinstance(target, _Function):
            target = getattr(importlib.import_module(target.module), target.name)
        found[name] = graph.create_node(op, target, unpacked(args), unpacked(kwargs), name)
    return graph
