"""Record a forward while it runs for real: torch functions, module calls and sizes become nodes of a graph a frame."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastslim.graph.counts import Count
from fastslim.graph.frame import Frame, flatten_arguments, here
from fastslim.graph.frame_nodes import DATA, INDICES, OpenFrame, depends_on
from fastslim.graph.leaves import is_leaf
from fastslim.graph.recorder_functions import FunctionRecorder
from fastslim.graph.recorder_values import (
    attributes_of,
    describe_value,
    fresh,
    leaf_values,
    plain_values,
    python_random_state,
    same_attributes,
    values_in,
)


class Recorder(FunctionRecorder):
    """Runs and records a model's forward.

    Args:
        model: the model, in the mode to be recorded.
        opaque: names of submodules that are not looked into.
        disguise: added to the digits of all sizes, see `fastslim.graph.leaks`.
        honest: names of modules in whose forward digits are the values.
    """

    def __init__(self, model: nn.Module, opaque: Iterable[str], disguise: int = 0, honest: Iterable[str] = ()) -> None:
        super().__init__(model, disguise, honest)
        self.opaque = frozenset(opaque)
        self.failed_in: str | None = None
        self.failed_frame: str | None = None

    def run(self, inputs: Mapping[str, Any]) -> tuple[Frame, list[fx.Node]]:
        """Runs forward; returns the model's frame, and the nodes of all tensors that came out."""
        original, recorder = nn.Module.__call__, self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return recorder._call(original, module, args, kwargs)

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            self.recording = True
            with self:
                frame, outputs = self._frame(self.model, self.model.forward, (), dict(inputs))
        finally:
            self.recording = False
            nn.Module.__call__ = original  # type: ignore[method-assign]
        return frame, outputs

    def _call(self, original: Callable[..., Any], module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if not self.recording or not self._stack or id(module) not in self._names:
            return original(module, *args, **kwargs)
        if self._is_opaque(module):  # with its hooks
            return self._leaf(module, lambda *a, **k: original(module, *a, **k), args, kwargs)
        caller, attributes = self._stack[-1], module.__dict__
        nodes = caller.frame.graph.nodes
        had, before, forward, length = "forward" in attributes, attributes.get("forward"), module.forward, len(nodes)

        def restore() -> None:
            if had:
                attributes["forward"] = before
            else:
                attributes.pop("forward", None)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            nonlocal length
            notice_hooks()
            restore()
            try:
                if is_leaf(module):
                    return self._leaf(module, forward, args, kwargs)
                return self._inside(module, forward, args, kwargs)
            except Exception:
                self.failed_in = self._names[id(module)][0] if self.failed_in is None else self.failed_in
                raise
            finally:
                length = len(nodes)

        def notice_hooks() -> None:
            if len(nodes) != length:
                caller.obstacle(f"a hook of {self._names[id(module)][0]} computes")

        # Hooks run as ever, around the recorded forward; what they compute is recorded in the caller's graph.
        attributes["forward"] = recorded
        try:
            result = original(module, *args, **kwargs)
        finally:
            restore()
        notice_hooks()
        return result

    def _is_opaque(self, module: nn.Module) -> bool:
        return isinstance(module, torch.jit.ScriptModule) or not self.opaque.isdisjoint(self._names[id(module)])

    def _leaf(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        caller = self._stack[-1]
        node = self._call_node(caller, module, args, kwargs)
        modes = [(m, m.training) for m in module.modules()]
        module.eval()  # batch statistics of one example are neither defined nor wanted
        self.recording = False
        try:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                result = forward(*plain_values(args), **plain_values(kwargs))
        finally:
            self.recording = True
            for m, mode in modes:
                m.training = mode
        if not getattr(module, "inplace", False):
            result = fresh(result, args)
        return self._register(caller, node, result, DATA)

    def _inside(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """A module that is looked into: a frame of its own, and one call in the caller's graph."""
        caller = self._stack[-1]
        call = self._call_node(caller, module, args, kwargs)
        results: list[Any] = []
        before = [self._node_of.get(arg) for arg in args if isinstance(arg, Tensor)]
        frame, _ = self._frame(module, forward, args, kwargs, caller, results)
        caller.frame.children[call] = frame
        inside = self._open_of[frame.graph]
        inner_nodes = [self._node(inside, leaf) for leaf in leaf_values(results[0])]
        if before == [self._node_of.get(arg) for arg in args if isinstance(arg, Tensor)]:
            results[0] = fresh(results[0], args)
        for (leaf, node), inner in zip(self._leaves(caller, call, results[0]), inner_nodes, strict=True):
            node.meta.update(inner=inner, depends=depends_on(inner))
            describe_value(node, leaf)
            if isinstance(leaf, Tensor):
                self._node_of[leaf] = node
            else:
                caller.nodes[leaf.node] = node
        inside.tensors.clear()
        return results[0]

    def _frame(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        caller: OpenFrame | None = None,
        results: list[Any] | None = None,
    ) -> tuple[Frame, list[fx.Node]]:
        graph = fx.Graph()
        frame = Frame(self._names[id(module)][0], module, graph, module.training)
        current = self._open_of[graph] = OpenFrame(frame)
        self._bind(current, caller, forward, args, kwargs)
        draws, attributes = python_random_state(), attributes_of(module)
        self._stack.append(current)
        try:
            result = forward(*args, **kwargs)
        except Exception:
            self.failed_frame = frame.name if self.failed_frame is None else self.failed_frame
            raise
        finally:
            self._stack.pop()
        if python_random_state() != draws:
            current.obstacle("forward draws random numbers in Python")
        if not same_attributes(attributes, attributes_of(module)):
            current.obstacle("forward changes an attribute of the module")
        graph.output(self._argument(current, result))
        if results is not None:
            results.append(result)
        return frame, [self._node(current, leaf) for leaf in values_in(result) if isinstance(leaf, Tensor)]

    def _bind(
        self, current: OpenFrame, caller: OpenFrame | None, forward: Callable[..., Any], args: tuple, kwargs: dict
    ) -> None:
        """Makes an input of every tensor and every size among the arguments."""
        frame = current.frame
        arguments: Any = {"args": args, "kwargs": kwargs}
        try:
            bound = inspect.signature(forward).bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = dict(bound.arguments)
        except (TypeError, ValueError):
            current.obstacle("forward's signature is unknown")
        leaves, frame.binding = flatten_arguments(arguments)
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, Count)):
                if any(True for _ in values_in(leaf)):
                    current.obstacle(f"a {type(leaf).__name__} that holds tensors is among the arguments")
                frame.leaves.append(leaf)
                continue
            outer = None if caller is None else self._node(caller, leaf)
            node = frame.graph.placeholder(f"input_{len(frame.leaves)}")
            given = DATA if isinstance(leaf, Tensor) and leaf.is_floating_point() else INDICES
            node.meta.update(outer=outer, location="", depends=given if outer is None else depends_on(outer))
            describe_value(node, leaf)
            if isinstance(leaf, Tensor):
                current.tensors[id(leaf)] = (leaf, node)
            else:
                current.nodes[leaf.node] = node
            frame.leaves.append(node)

    def _call_node(self, caller: OpenFrame, module: nn.Module, args: tuple, kwargs: dict) -> fx.Node:
        names, prefix = self._names[id(module)], caller.frame.name + "." if caller.frame.name else ""
        full = next((name for name in names if name.startswith(prefix)), None)
        if full is None:
            caller.obstacle(f"it calls {names[0]}, which is not a part of it")
        target = names[0] if full is None else full[len(prefix) :]
        node = caller.frame.graph.call_module(target, self._argument(caller, args), self._argument(caller, kwargs))
        node.meta.update(location=here(), module=names[0])
        return node
