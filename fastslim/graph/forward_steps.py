"""Take the steps of a forward out of its recording: which tensors are made, and from which."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastslim.graph.frame import Captured, Frame
from fastslim.graph.known import Known, Layout, Size, name_of
from fastslim.graph.parts import Parts
from fastslim.graph.steps import ForwardSteps, NumberSpec, Step, TensorSpec, find_function
from fastslim.graph.units import DimSpec

_TAKES = (operator.getitem, getattr)
_IN_PLACE = frozenset("setitem iadd isub imul itruediv ipow iand ior ixor".split())


def forward_steps(
    captured: Captured, known: Mapping[fx.Node, Known], dims_of: Callable[[Parts], DimSpec]
) -> ForwardSteps:
    """Takes the steps out of a recording.

    Args:
        captured: the recorded forward.
        known: what the analysis found out about each node.
        dims_of: turns parts into indices of the trace's units.
    """
    walk = _Walk(known, dims_of)
    walk.frame(captured.root)
    outputs = [walk.at.get(_source(node)) for node in captured.outputs]
    first = next((spec.dims for spec in walk.activations[: walk.inputs] if spec.dims), (((None, 1),),))
    return ForwardSteps(
        tuple(draft.step() for draft in walk.drafts if draft.makes or draft.in_place),
        tuple(walk.activations),
        walk.inputs,
        tuple(dict.fromkeys(index for index in outputs if index is not None)),
        max(1, sum(channels for _, channels in first[0])),
        tuple((name, tensor.element_size()) for name, tensor in _saved(captured.model)),
    )


def _saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers as a state_dict has them, shared ones once."""
    yield from model.named_parameters()
    temporary = {
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        for key in module._non_persistent_buffers_set
    }
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name not in temporary)


def _source(node: fx.Node) -> fx.Node:
    """Where a value that a module was given, or gave back, was made."""
    while (other := node.meta.get("inner", node.meta.get("outer"))) is not None:
        node = other
    return node


@dataclass
class _Draft:
    module: str
    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[int, ...]
    in_place: bool
    makes: list[int] = field(default_factory=list)

    def step(self) -> Step:
        return Step(
            self.module,
            self.function,
            self.args,
            tuple(self.kwargs.items()),
            self.reads,
            tuple(dict.fromkeys(self.makes)),
        )


class _Walk:
    """Goes through the frames; `at` says which activation a node is (None: a stored tensor)."""

    def __init__(self, known: Mapping[fx.Node, Known], dims_of: Callable[[Parts], DimSpec]) -> None:
        self.known, self.dims_of = known, dims_of
        self.activations: list[TensorSpec] = []
        self.drafts: list[_Draft] = []
        self.at: dict[fx.Node, int | None] = {}
        self.inputs = 0
        self._of_storage: dict[Any, int | None] = {}
        self._draft_of: dict[fx.Node, _Draft] = {}

    def frame(self, frame: Frame) -> None:
        for node in frame.graph.nodes:
            if node in frame.children:
                self.frame(frame.children[node])
            elif node.op == "output" or _source(node) is not node:
                continue
            elif node.op == "placeholder":
                if "shape" in node.meta:
                    self._new(node)
                    self.inputs = len(self.activations)
            elif node.op == "get_attr":
                self.at[node] = self._of_storage[self._storage(node)] = None
            else:
                self._operation(frame, node)

    def _operation(self, frame: Frame, node: fx.Node) -> None:
        parent = node.args[0] if node.args else None
        if node.target in _TAKES and isinstance(parent, fx.Node) and parent in self._draft_of and not _is_one(parent):
            draft = self._draft_of[node] = self._draft_of[parent]  # one of several results
        else:
            draft = self._draft_of[node] = self._draft(frame, node)
            self.drafts.append(draft)
        if not _is_one(node):
            return
        storage = self._storage(node)
        if storage not in self._of_storage:
            draft.makes.append(self._new(node))
            return
        index = self._of_storage[storage]
        if draft.in_place and index is not None and _entries(node) == _size(self.activations[index]):
            draft.makes.append(self._new(node))
        else:
            self.at[node] = index

    def _draft(self, frame: Frame, node: fx.Node) -> _Draft:
        name = name_of(node)
        module, function, in_place = "", "", False
        if node.op == "call_module":
            module = str(node.meta["module"])
            in_place = bool(getattr(_module(frame, node), "inplace", False))
        else:
            function = f"Tensor.{node.target}" if node.op == "call_method" else _qualified_name(node.target)
            in_place = bool(
                name in _IN_PLACE
                or (name.endswith("_") and not name.endswith("__"))
                or (name.startswith("__i") and name.strip("_") in _IN_PLACE)
                or node.kwargs.get("inplace")
                or "out" in node.kwargs
            )
        reads = [self.at.get(_source(argument)) for argument in node.all_input_nodes]
        return _Draft(
            module,
            function,
            tuple(self._argument(argument) for argument in node.args),
            {key: self._argument(value) for key, value in node.kwargs.items()},
            tuple(dict.fromkeys(index for index in reads if index is not None)),
            in_place,
        )

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            if "shape" in value.meta:
                return self._spec(value)
            known = self.known.get(value)
            if isinstance(known, Size) and known.exact:
                return NumberSpec(self.dims_of(known.parts), known.divisor)
            return value.meta.get("value")
        if isinstance(value, (tuple, list)):
            return (
                type(value)(self._argument(item) for item in value) if not hasattr(value, "_fields") else tuple(value)
            )
        if isinstance(value, dict):
            return {key: self._argument(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*map(self._argument, (value.start, value.stop, value.step)))
        return value

    def _new(self, node: fx.Node) -> int:
        index = self.at[node] = self._of_storage[self._storage(node)] = len(self.activations)
        self.activations.append(self._spec(node))
        return index

    def _spec(self, node: fx.Node) -> TensorSpec:
        known, shape = self.known.get(node), node.meta["shape"]
        dims = known.dims if isinstance(known, Layout) and len(known.dims) == len(shape) else (None,) * len(shape)
        return TensorSpec(
            tuple(((None, size),) if dim is None else self.dims_of(dim) for dim, size in zip(dims, shape, strict=True)),
            node.meta["dtype"],
            self.at.get(_source(node), 0) is None,
            _order(node.meta.get("strides", ())),
        )

    def _storage(self, node: fx.Node) -> Any:
        storage = node.meta.get("storage")
        return node if storage is None else storage.cdata


def _is_one(node: fx.Node) -> bool:
    """Whether the node's value is one tensor."""
    return "shape" in node.meta


def _order(strides: tuple[int, ...]) -> tuple[int, ...]:
    order = tuple(sorted(range(len(strides)), key=lambda dim: -strides[dim]))
    return () if order == tuple(range(len(strides))) else order


def _entries(node: fx.Node) -> int:
    return math.prod(node.meta["shape"])


def _size(spec: TensorSpec) -> int:
    return math.prod(sum(channels for _, channels in dim) for dim in spec.dims)


def _module(frame: Frame, node: fx.Node) -> nn.Module:
    return frame.module.get_submodule(str(node.target))


def _qualified_name(function: Any) -> str:
    """``torch.nn.functional.relu``; empty when the function cannot be found again by its name."""
    if getattr(Tensor, getattr(function, "__name__", ""), None) is function:
        return f"Tensor.{function.__name__}"
    try:
        name = torch.fx.node._get_qualified_name(function)
    except (AttributeError, RuntimeError):
        return ""
    return name if find_function(name) is function else ""
