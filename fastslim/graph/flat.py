"""A recording as one graph over the model, its frames put in the places of their calls."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from fastslim.errors import FastslimRuntimeError
from fastslim.graph.frame import Captured, Frame
from fastslim.graph.pairs import with_pairs


def flatten_frames(captured: Captured) -> fx.Graph:
    """One graph; modules and parameters are named from the model.

    Raises:
        FastslimRuntimeError: when forward uses a tensor that the model does not hold.
    """
    graph, environment = fx.Graph(), {}
    for leaf in captured.root.leaves:
        if isinstance(leaf, fx.Node):
            environment[leaf] = graph.placeholder(leaf.name)
            environment[leaf].meta = dict(leaf.meta)
    _copy(captured.root, graph, environment)
    output = next(node for node in captured.root.graph.nodes if node.op == "output")
    graph.output(fx.node.map_arg(output.args[0], lambda n: environment[n]))
    return graph


def as_function(graph: fx.Graph, model: nn.Module) -> Callable[..., Any]:
    """The graph as Python code, ``function(model, *inputs)``; for this very model."""
    code = with_pairs(graph, model).python_code(root_module="self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<execution plan>", "exec"), namespace)
    function: Callable[..., Any] = namespace["forward"]
    return function


def _copy(frame: Frame, graph: fx.Graph, environment: dict[fx.Node, Any]) -> None:
    for node in frame.graph.nodes:
        if node.op == "output" or node in environment:
            continue
        if node in frame.children:
            _copy(frame.children[node], graph, environment)
        source = node.meta.get("inner", node.meta.get("outer"))
        if source is not None:
            environment[node] = environment[source]
        elif node in frame.children or _takes_apart(node, frame):
            continue
        else:
            copy = environment[node] = graph.node_copy(node, lambda n: environment[n])
            copy.meta = dict(node.meta)
            if node.op == "call_module":
                copy.target = node.meta["module"]
            elif node.op == "get_attr":
                if node.meta["tensor"] is None:
                    raise FastslimRuntimeError(f"forward uses a tensor of its own at {node.meta['location']}")
                copy.target = node.meta["tensor"]


def _takes_apart(node: fx.Node, frame: Frame) -> bool:
    """Whether the node only takes an element out of what a frame returns."""
    while node.target in (operator.getitem, getattr) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        if node in frame.children:
            return True
    return False
