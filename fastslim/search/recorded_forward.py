"""A network's recorded forward, to be run node by node, and checked to be the network's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from fastslim.algorithms import SlimmableAlgorithm
from fastslim.errors import FastslimError
from fastslim.graph import Trace
from fastslim.graph.capture import bind_inputs, capture
from fastslim.graph.flat import flatten_frames
from fastslim.graph.rewrite import RewrittenForward, bound_leaves

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class NotSharedError(Exception):
    """Says why a forward cannot be run node by node."""


class RecordedForward:
    """The forward of an algorithm's network in evaluation mode, as a graph of calls.

    Args:
        algo: whose network it is; widths and modes are seen to by the caller.
        batches: inputs it will be run on; on a few samples of the first one it is compared with the network's own
            forward, at the largest and the smallest widths.

    Attributes:
        graph: its nodes call modules of the network, and functions.
        place: position of every node.
        live: nodes that the output depends on.
        output: the last node.
        overwrites: values that a node changes in place.

    Raises:
        NotSharedError: the recording does not stand for the forward.
    """

    def __init__(self, algo: SlimmableAlgorithm, batches: Sequence[Any]) -> None:
        self.algo, self.model = algo, algo.architecture
        if torch.is_inference_mode_enabled():
            raise NotSharedError("tensors of the inference mode do not tell when they are changed in place")
        if not algo.mutator.is_traced:
            raise NotSharedError("the network was not traced")
        self._record(algo.mutator.trace)
        self.modules = dict(self.model.named_modules())
        self.place = {node: position for position, node in enumerate(self.graph.nodes)}
        self.output = next(node for node in self.graph.nodes if node.op == "output")
        self.live = ancestors(self.output.all_input_nodes)
        if not any(node.op == "placeholder" for node in self.live):
            raise NotSharedError("the output does not depend on the input")
        self.overwrites: dict[fx.Node, list[fx.Node]] = {}
        for inputs in batches:
            self.inputs(inputs)
        for choices in (algo.mutator.max_choices, algo.mutator.min_choices):
            algo.mutator.set_choices(choices)
            self._compare(_few(batches[0]))

    def _record(self, trace: Trace) -> None:
        named = dict(self.model.named_modules())
        own = {
            name: "is watched by a hook"
            if any(getattr(module, hooks) for hooks in _HOOKS)
            else "runs a rewritten forward at narrow widths"
            for name, module in named.items()
            if any(getattr(module, hooks) for hooks in _HOOKS)
            or isinstance(vars(module).get("forward"), RewrittenForward)
        }
        if "" in own:
            raise NotSharedError(f"the network as a whole {own['']}")
        try:
            example = bind_inputs(self.model, trace.example_inputs)  # of the present device and data type
            captured = capture(self.model, example, training=False, opaque=frozenset(own))
            self.graph = flatten_frames(captured)
        except FastslimError as error:
            raise NotSharedError(str(error)) from error
        for frame in captured.frames():
            if frame.obstacles:
                raise NotSharedError(frame.obstacles[0])
            for guard in frame.guards:
                raise NotSharedError(f"forward turns a size into a Python number or a branch at {guard.location}")
        self.binding = captured.root.binding
        self.leaves = captured.root.leaves

    def inputs(self, inputs: Any) -> dict[fx.Node, Any]:
        """The placeholders' values for a batch; all that is no tensor must be what was recorded."""

        def leaves_of(*args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
            return bound_leaves(self.model, args, kwargs)

        leaves, binding = self.algo.call(leaves_of, inputs)  # type: ignore[arg-type]
        same = binding == self.binding and all(
            isinstance(recorded, fx.Node) or (not isinstance(leaf, Tensor) and leaf == recorded)
            for leaf, recorded in zip(leaves, self.leaves, strict=True)
        )
        if not same:
            raise NotSharedError("the network is called with other arguments than the example inputs")
        nodes = [node for node in self.graph.nodes if node.op == "placeholder"]
        tensors = [leaf for leaf, recorded in zip(leaves, self.leaves, strict=True) if isinstance(recorded, fx.Node)]
        return dict(zip(nodes, tensors, strict=True))

    def _compare(self, inputs: Any) -> None:
        """Runs all nodes, notes which ones overwrite what they read, and compares the output with the network's."""
        values: dict[fx.Node, Any] = self.inputs(inputs)
        try:
            for node in self.graph.nodes:
                if node.op in ("placeholder", "output"):
                    continue
                before = {source: versions_of(values[source]) for source in node.all_input_nodes}
                values[node] = self.call(node, values)
                changed = [source for source, versions in before.items() if versions_of(values[source]) != versions]
                if changed:
                    self._check_overwriting(node, changed, values)
                    self.overwrites[node] = changed
            ours = fx.node.map_arg(self.output.args[0], lambda node: values[node])
            theirs = self.algo.call(self.model, inputs)
            torch.testing.assert_close(ours, theirs, equal_nan=True)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise NotSharedError(f"the recorded forward is not the network's own: {error}") from error

    def _check_overwriting(self, node: fx.Node, changed: Iterable[fx.Node], values: Mapping[fx.Node, Any]) -> None:
        """Nobody may see what was overwritten but by the node that did it."""
        if not all(isinstance(values[source], Tensor) for source in changed):
            raise NotSharedError(f"forward changes several tensors in place at once ({node.format_node()})")
        memory = {pointer for source in changed for pointer in memory_of(values[source])}
        for other, value in values.items():
            later = other is not node and any(self.place[user] > self.place[node] for user in other.users)
            stored = other.op in ("placeholder", "get_attr")
            if (later or stored or node not in self.live) and memory & memory_of(value):
                raise NotSharedError(f"forward changes a tensor in place and reads it again ({node.format_node()})")

    def call(self, node: fx.Node, values: Mapping[fx.Node, Any], kept: Iterable[Any] = ()) -> Any:
        """The value of a node; what it would overwrite is copied where someone else still needs that memory."""
        if node in self.overwrites:
            memory = {pointer for value in kept for pointer in memory_of(value)}
            copies = {t: values[t].clone() for t in self.overwrites[node] if memory & memory_of(values[t])}
            values = {**values, **copies}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: values[source])
        if node.op == "call_module":
            return self.modules[str(node.target)](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "get_attr":
            return attrgetter(str(node.target))(self.model)
        return node.target(*args, **kwargs)


def _few(inputs: Any, count: int = 4) -> Any:
    """The first samples of a batch: the comparison keeps all activations."""
    samples = next((len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()), 0)

    def cut(leaf: Any) -> Any:
        return leaf[:count] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == samples else leaf

    return tree_map(cut, inputs)


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes, and all that they are computed from."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def versions_of(value: Any) -> list[int]:
    """Counts that grow when a tensor is changed in place."""
    return [leaf._version for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def memory_of(value: Any) -> Set[int]:
    """Where the tensors of a value lie."""
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)} - {0}
