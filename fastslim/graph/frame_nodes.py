"""Which node of which frame stands for a value that forward handles: a tensor, or a size."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C import _functorch as functorch
from torch.utils.weak import WeakIdKeyDictionary

from fastslim.graph.counts import Count, plain
from fastslim.graph.frame import Frame, Guard, here
from fastslim.graph.recorder_values import describe_value, values_in

# What a tensor depends on: nothing that changes; inputs of whole numbers (tokens, masks) or random numbers; data.
NOTHING, INDICES, DATA = range(3)


class DataDependentError(Exception):
    """Forward does something with data that a recording cannot hold; `module` names the module that does."""

    def __init__(
        self,
        module: str,
        place: str,
        what: str = "data-dependent control flow (a tensor's values are taken as a Python number)",
    ) -> None:
        super().__init__(f"{what} at {place}")
        self.module, self.place = module, place


def depends_on(node: fx.Node) -> int:
    """What the value of a node depends on."""
    return node.meta.get("depends", DATA)


class OpenFrame:
    """A frame while its forward runs: which nodes stand for values from outside."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.tensors: dict[int, tuple[Tensor, fx.Node]] = {}
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.sizes: dict[tuple[fx.Node, int], fx.Node] = {}
        self.grad_modes: list[fx.Node] = []  # what gradients were before each ``no_grad`` that is open

    def obstacle(self, reason: str) -> None:
        """Notes why the recording cannot stand for the forward."""
        if reason not in self.frame.obstacles:
            self.frame.obstacles.append(reason)


class FrameNodes:
    """The nodes of the values of a running forward.

    Args:
        model: the model that runs.
    """

    def __init__(self, model: nn.Module, disguise: int = 0, honest: Iterable[str] = ()) -> None:
        super().__init__()
        self.model = model
        self.disguise, self.honest = disguise, frozenset(honest)
        self.recording = False
        self._names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._names.setdefault(id(module), []).append(name)
        self._tensor_names: dict[int, list[str]] = {}
        for named in (model.named_parameters, model.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                self._tensor_names.setdefault(id(tensor), []).append(name)
        self._node_of = WeakIdKeyDictionary()
        self._stack: list[OpenFrame] = []
        self._open_of: dict[fx.Graph, OpenFrame] = {}

    def _node(self, current: OpenFrame, value: Any) -> fx.Node:
        """The node of the current frame that stands for a tensor or a size."""
        graph = current.frame.graph
        if isinstance(value, Count):
            node, known = value.node, current.nodes
        else:
            node = self._node_of.get(value)
            known = {}
        if node is not None and node.graph is graph:
            return node
        if isinstance(value, Tensor):
            if id(value) in current.tensors:
                return current.tensors[id(value)][1]
            if node is None or id(value) in self._tensor_names:
                return self._attribute(current, value)
            known = current.nodes
        if node in known:
            return known[node]
        # It came in, or went out, by another way than arguments and results.
        local = known[node] = self._input(current, node, value)
        current.obstacle("it uses a tensor or size that is not among its arguments")
        self._open_of[node.graph].obstacle("a tensor or size leaves it by another way than its result")
        return local

    def _input(self, current: OpenFrame, outer: fx.Node, value: Any) -> fx.Node:
        graph = current.frame.graph
        with graph.inserting_before(next(iter(graph.nodes), None)):
            node = graph.placeholder("outside")
        node.meta.update(outer=outer, location="", depends=depends_on(outer))
        describe_value(node, value)
        return node

    def _check_transform(self, current: OpenFrame, tensor: Tensor) -> None:
        """Inside `torch.vmap` and the like tensors are wrapped, and what happens to them is not seen."""
        inner = tensor
        while functorch.is_functorch_wrapped_tensor(inner):
            inner = functorch.get_unwrapped(inner)
        node = self._node_of.get(inner)
        if inner is not tensor and node is not None and depends_on(node) == DATA:
            raise DataDependentError(current.frame.name, here(), "a transform of functions (torch.vmap, torch.func)")

    def _attribute(self, current: OpenFrame, tensor: Tensor) -> fx.Node:
        """A parameter, a buffer, or a tensor that was there before."""
        module, prefix = current.frame.module, current.frame.name + "." if current.frame.name else ""
        names = self._tensor_names.get(id(tensor), [])
        target = next((name[len(prefix) :] for name in names if name.startswith(prefix)), None)
        if target is None:
            target = next((key for key, value in vars(module).items() if value is tensor), None)
        if target is None:
            self._check_transform(current, tensor)
            current.obstacle("it uses a tensor of another module" if names else "it uses a tensor from elsewhere")
            target = "unknown"
        node = current.frame.graph.create_node("get_attr", target)
        depends = DATA if names and tensor.is_floating_point() else NOTHING
        node.meta.update(location=here(), depends=depends, tensor=names[0] if names else None, constant=tensor)
        describe_value(node, tensor)
        current.tensors[id(tensor)] = (tensor, node)
        return node

    def _argument(self, current: OpenFrame, value: Any) -> Any:
        """The value as an argument of a node."""
        if isinstance(value, (Tensor, Count)):
            return self._node(current, value)
        if isinstance(value, (tuple, list)):
            items = [self._argument(current, item) for item in value]
            if isinstance(value, tuple) and hasattr(value, "_fields"):
                return type(value)(*items)
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            if type(value) is not dict:
                current.obstacle(f"a {type(value).__name__} is passed on")
            return {key: self._argument(current, item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*(self._argument(current, item) for item in (value.start, value.stop, value.step)))
        if value is None or value is Ellipsis or isinstance(value, fx.node.base_types):
            return value
        if is_dataclass(value) and not isinstance(value, type):
            current.obstacle(f"a {type(value).__name__} is passed on")
            return [self._argument(current, getattr(value, field.name)) for field in fields(value)]
        current.obstacle(f"a {type(value).__name__} is passed on")
        return [self._node(current, leaf) for leaf in values_in(value)]

    def _leaves(self, current: OpenFrame, node: fx.Node, value: Any) -> Iterator[tuple[Any, fx.Node]]:
        """Every tensor and size in a value, with a node that takes it out of `node`."""
        if isinstance(value, (Tensor, Count)):
            yield value, node
            return
        items: list[tuple[Any, Any, Any]] = []
        if isinstance(value, (tuple, list)):
            items = [(operator.getitem, i, v) for i, v in enumerate(value)]
        elif isinstance(value, Mapping):
            items = [(operator.getitem, key, v) for key, v in value.items()]
        elif is_dataclass(value) and not isinstance(value, type):
            items = [(getattr, field.name, getattr(value, field.name)) for field in fields(value)]
        elif any(True for _ in values_in(value)):
            current.obstacle(f"a {type(value).__name__} that holds tensors is passed on")
        for take, key, item in items:
            if any(True for _ in values_in(item)):
                part = current.frame.graph.call_function(take, (node, key))
                part.meta.update(location=node.meta.get("location", ""), depends=depends_on(node))
                yield from self._leaves(current, part, item)

    def _register(self, current: OpenFrame, node: fx.Node, result: Any, depends: int) -> Any:
        node.meta["depends"] = depends
        for leaf, own in self._leaves(current, node, result):
            if isinstance(leaf, Tensor):
                own.meta["depends"] = depends
                describe_value(own, leaf)
                self._node_of[leaf] = own
        return result

    def _size(self, current: OpenFrame, func: Any, name: str, args: tuple, kwargs: dict) -> Any:
        sizes = self._sizes(current, args[0])
        dim = args[1] if len(args) > 1 and name == "size" else kwargs.get("dim")
        return torch.Size(sizes) if dim is None else sizes[plain(dim)]

    def _sizes(self, current: OpenFrame, tensor: Tensor) -> tuple[Count, ...]:
        source = self._node(current, tensor)
        with torch._C.DisableTorchFunction():
            shape = tuple(tensor.shape)
        counts = []
        for dim, value in enumerate(shape):
            node = current.sizes.get((source, dim))
            if node is None:
                node = current.sizes[source, dim] = current.frame.graph.call_method("size", (source, dim))
                node.meta.update(location=here(), value=value, depends=NOTHING)
            counts.append(Count(value, node, self))
        return tuple(counts)

    def digits_of(self, value: int) -> int:
        """What C code sees that takes a size without asking."""
        if self._stack and self._stack[-1].frame.name in self.honest:
            return value
        return value + self.disguise

    def record_count(self, function: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
        """Integer arithmetic with sizes."""
        value = function(*map(plain, operands))
        if not self._stack:
            return value
        current = self._stack[-1]
        node = current.frame.graph.call_function(function, tuple(self._argument(current, o) for o in operands))
        node.meta.update(location=here(), value=value, depends=NOTHING)
        return Count(value, node, self)

    def record_test(self, function: Callable[..., bool], operands: tuple[Any, ...]) -> bool:
        """A comparison of sizes: the recording holds while its outcome is the same."""
        result = function(*map(plain, operands))
        if self._stack:
            current = self._stack[-1]
            node = current.frame.graph.call_function(function, tuple(self._argument(current, o) for o in operands))
            node.meta.update(location=here(), value=result, depends=NOTHING)
            current.frame.guards.append(Guard(node, result, here(), compares=True))
        return result

    def record_use(self, count: Count, *, compares: bool = True) -> None:
        """Python takes a size as a plain number."""
        if self._stack:
            current = self._stack[-1]
            guard = Guard(self._node(current, count), plain(count), here(), compares)
            if guard not in current.frame.guards:
                current.frame.guards.append(guard)
