"""Record a forward while it runs for real: torch functions, module calls and sizes become nodes of one graph a frame."""

from __future__ import annotations

import inspect
import operator
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from fastslim.graph.counts import Count, plain
from fastslim.graph.frame import Frame, Guard, flatten_arguments, here
from fastslim.nn import SlimLayer

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.RMSNorm,
    nn.PReLU,
    nn.Embedding,
    nn.MultiheadAttention,
)
# They hand a tensor's data to Python.
_READS_DATA = frozenset(
    "item tolist numpy __bool__ __float__ __int__ __index__ __complex__ __contains__ __array__ equal allclose "
    "is_nonzero".split()
)
_RANDOM = frozenset(
    "rand randn randint randperm rand_like randn_like randint_like bernoulli bernoulli_ multinomial normal normal_ "
    "uniform_ random_ exponential_".split()
)
# Verdicts on float data that training code may ask for: their usual answer is taken.
_VERDICTS = frozenset(("isfinite", "isinf", "isnan"))
# What a tensor depends on: nothing that changes; inputs of whole numbers (tokens, masks) or random numbers; data.
_NOTHING, _INDICES, _DATA = range(3)
_SUBSCRIPTS = {"__getitem__": operator.getitem, "__setitem__": operator.setitem}


class DataDependentError(Exception):
    """Forward decides by the values of a tensor; `module` names the module that does."""

    def __init__(self, module: str, place: str) -> None:
        super().__init__(f"data-dependent control flow (a tensor's values are taken as a Python number) at {place}")
        self.module, self.place = module, place


def _depends(node: fx.Node) -> int:
    return node.meta.get("depends", _DATA)


class _Open:
    """A frame while its forward runs: which nodes stand for values from outside."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.tensors: dict[int, tuple[Tensor, fx.Node]] = {}
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.sizes: dict[tuple[fx.Node, int], fx.Node] = {}

    def obstacle(self, reason: str) -> None:
        if reason not in self.frame.obstacles:
            self.frame.obstacles.append(reason)


class Recorder(TorchFunctionMode):
    """Runs and records a model's forward.

    Args:
        model: the model, in the mode to be recorded.
        opaque: names of submodules that are not looked into.
    """

    def __init__(self, model: nn.Module, opaque: Iterable[str]) -> None:
        super().__init__()
        self.model, self.opaque = model, frozenset(opaque)
        self.recording = False
        self.failed_in: str | None = None
        self._names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._names.setdefault(id(module), []).append(name)
        self._tensor_names: dict[int, list[str]] = {}
        for named in (model.named_parameters, model.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                self._tensor_names.setdefault(id(tensor), []).append(name)
        self._node_of = WeakIdKeyDictionary()
        self._stack: list[_Open] = []
        self._open_of: dict[fx.Graph, _Open] = {}

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

    # -- modules

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
                if self._is_leaf(module):
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

    def _is_leaf(self, module: nn.Module) -> bool:
        if isinstance(module, (SlimLayer, nn.RNNBase, nn.RNNCellBase)) or type(module) in LAYERS:
            return True
        home = type(module).__module__
        if home.startswith(("torch.ao.", "torch.nn.quantized", "torch.nn.intrinsic")):
            return True
        return home.startswith("torch.nn.modules") and not module._modules and not module._parameters

    def _leaf(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        caller = self._stack[-1]
        node = self._call_node(caller, module, args, kwargs)
        modes = [(m, m.training) for m in module.modules()]
        module.eval()  # batch statistics of one example are neither defined nor wanted
        self.recording = False
        try:
            with torch._C.DisableTorchFunction():
                result = forward(*_plain(args), **_plain(kwargs))
        finally:
            self.recording = True
            for m, mode in modes:
                m.training = mode
        if not getattr(module, "inplace", False):
            result = _fresh(result, args)
        return self._register(caller, node, result, _DATA)

    def _inside(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """A module that is looked into: a frame of its own, and one call in the caller's graph."""
        caller = self._stack[-1]
        call = self._call_node(caller, module, args, kwargs)
        results: list[Any] = []
        before = [self._node_of.get(arg) for arg in args if isinstance(arg, Tensor)]
        frame, _ = self._frame(module, forward, args, kwargs, caller, results)
        caller.frame.children[call] = frame
        inside = self._open_of[frame.graph]
        inner_nodes = [self._node(inside, leaf) for leaf in _leaf_values(results[0])]
        if before == [self._node_of.get(arg) for arg in args if isinstance(arg, Tensor)]:
            results[0] = _fresh(results[0], args)
        for (leaf, node), inner in zip(self._leaves(caller, call, results[0]), inner_nodes, strict=True):
            node.meta.update(inner=inner, depends=_depends(inner))
            _describe(node, leaf)
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
        caller: _Open | None = None,
        results: list[Any] | None = None,
    ) -> tuple[Frame, list[fx.Node]]:
        graph = fx.Graph()
        frame = Frame(self._names[id(module)][0], module, graph, module.training)
        current = self._open_of[graph] = _Open(frame)
        self._bind(current, caller, forward, args, kwargs)
        draws, attributes = _python_random_state(), _plain_attributes(module)
        self._stack.append(current)
        try:
            result = forward(*args, **kwargs)
        finally:
            self._stack.pop()
        if _python_random_state() != draws:
            current.obstacle("forward draws random numbers in Python")
        if _plain_attributes(module) != attributes:
            current.obstacle("forward changes an attribute of the module")
        graph.output(self._argument(current, result))
        if results is not None:
            results.append(result)
        return frame, [self._node(current, leaf) for leaf in _values_in(result) if isinstance(leaf, Tensor)]

    def _bind(
        self, current: _Open, caller: _Open | None, forward: Callable[..., Any], args: tuple, kwargs: dict
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
                if any(True for _ in _values_in(leaf)):
                    current.obstacle(f"a {type(leaf).__name__} that holds tensors is among the arguments")
                frame.leaves.append(leaf)
                continue
            outer = None if caller is None else self._node(caller, leaf)
            node = frame.graph.placeholder(f"input_{len(frame.leaves)}")
            given = _DATA if isinstance(leaf, Tensor) and leaf.is_floating_point() else _INDICES
            node.meta.update(outer=outer, location="", depends=given if outer is None else _depends(outer))
            _describe(node, leaf)
            if isinstance(leaf, Tensor):
                current.tensors[id(leaf)] = (leaf, node)
            else:
                current.nodes[leaf.node] = node
            frame.leaves.append(node)

    def _call_node(self, caller: _Open, module: nn.Module, args: tuple, kwargs: dict) -> fx.Node:
        names, prefix = self._names[id(module)], caller.frame.name + "." if caller.frame.name else ""
        full = next((name for name in names if name.startswith(prefix)), None)
        if full is None:
            caller.obstacle(f"it calls {names[0]}, which is not a part of it")
        target = names[0] if full is None else full[len(prefix) :]
        node = caller.frame.graph.call_module(target, self._argument(caller, args), self._argument(caller, kwargs))
        node.meta.update(location=here(), module=names[0])
        return node

    # -- torch functions

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Runs a torch function, and records it when tensors come out."""
        kwargs = kwargs or {}
        if not self.recording or not self._stack:
            return func(*args, **kwargs)
        current, name = self._stack[-1], getattr(func, "__name__", "")
        attribute = getattr(func.__self__, "__name__", "") if name in ("__get__", "__set__") else ""
        if attribute == "shape" or name == "size":
            return self._size(current, func, name, args, kwargs)
        if name == "__set__":
            current.obstacle(f"it assigns to Tensor.{attribute}")
        if name in ("__len__", "unbind", "split") and isinstance(args[0], Tensor):
            self._count_pieces(current, name, args, kwargs)
        result = func(*_plain(args), **_plain(_without_batch_statistics(name, args, kwargs)))
        if name in ("numel", "nelement"):
            return Count(result, self._describe_call(current, func, name, args, kwargs, result), self)
        if not any(isinstance(value, Tensor) for value in _values_in(result)):
            if name in _READS_DATA:
                self._read(current, args[0])
            return result
        if attribute:
            node = current.frame.graph.call_function(getattr, (self._node(current, args[0]), attribute))
            node.meta["location"] = here()
        else:
            node = self._describe_call(current, func, name, args, kwargs, result)
        depends = max((_depends(n) for n in node.all_input_nodes), default=_INDICES if name in _RANDOM else _NOTHING)
        if name in _VERDICTS:
            depends = min(depends, _INDICES)
        if not (name.endswith("_") or name == "setitem" or kwargs.get("inplace") or "out" in kwargs):
            result = _fresh(result, args)
        return self._register(current, node, result, depends)

    def _count_pieces(self, current: _Open, name: str, args: tuple, kwargs: dict) -> None:
        """How many pieces Python gets is not recorded, so it is noted."""
        if name == "split" and not isinstance(args[1] if len(args) > 1 else kwargs.get("split_size"), int):
            return
        place = 2 if name == "split" else 1
        dim = args[place] if len(args) > place else kwargs.get("dim", 0)
        self.record_use(self._sizes(current, args[0])[0 if name == "__len__" else plain(dim)])

    def _read(self, current: _Open, tensor: Tensor) -> None:
        """Python reads the values of a tensor."""
        depends = _depends(self._node(current, tensor))
        if depends == _DATA:
            raise DataDependentError(current.frame.name, here())
        if depends == _INDICES:
            current.obstacle(f"it decides by tokens, masks or random numbers at {here()}")

    def _describe_call(self, current: _Open, func: Any, name: str, args: tuple, kwargs: dict, result: Any) -> fx.Node:
        graph = current.frame.graph
        arguments, named = self._argument(current, args), self._argument(current, kwargs)
        if name in _SUBSCRIPTS:
            node = graph.call_function(_SUBSCRIPTS[name], arguments, named)
        elif getattr(Tensor, name, None) is func:
            node = graph.call_method(name, arguments, named)
        else:
            node = graph.call_function(func, arguments, named)
        node.meta["location"] = here()
        if isinstance(result, (int, float)):
            node.meta["value"] = result
        return node

    def _register(self, current: _Open, node: fx.Node, result: Any, depends: int) -> Any:
        node.meta["depends"] = depends
        for leaf, own in self._leaves(current, node, result):
            if isinstance(leaf, Tensor):
                own.meta["depends"] = depends
                _describe(own, leaf)
                self._node_of[leaf] = own
        return result

    def _leaves(self, current: _Open, node: fx.Node, value: Any) -> Iterator[tuple[Any, fx.Node]]:
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
        elif any(True for _ in _values_in(value)):
            current.obstacle(f"a {type(value).__name__} that holds tensors is passed on")
        for take, key, item in items:
            if any(True for _ in _values_in(item)):
                part = current.frame.graph.call_function(take, (node, key))
                part.meta.update(location=node.meta.get("location", ""), depends=_depends(node))
                yield from self._leaves(current, part, item)

    # -- values

    def _node(self, current: _Open, value: Any) -> fx.Node:
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

    def _input(self, current: _Open, outer: fx.Node, value: Any) -> fx.Node:
        graph = current.frame.graph
        with graph.inserting_before(next(iter(graph.nodes), None)):
            node = graph.placeholder("outside")
        node.meta.update(outer=outer, location="", depends=_depends(outer))
        _describe(node, value)
        return node

    def _attribute(self, current: _Open, tensor: Tensor) -> fx.Node:
        """A parameter, a buffer, or a tensor that was there before."""
        module, prefix = current.frame.module, current.frame.name + "." if current.frame.name else ""
        names = self._tensor_names.get(id(tensor), [])
        target = next((name[len(prefix) :] for name in names if name.startswith(prefix)), None)
        if target is None:
            target = next((key for key, value in vars(module).items() if value is tensor), None)
        if target is None:
            current.obstacle("it uses a tensor of another module" if names else "it uses a tensor from elsewhere")
            target = "unknown"
        node = current.frame.graph.create_node("get_attr", target)
        depends = _DATA if names and tensor.is_floating_point() else _NOTHING
        node.meta.update(location=here(), depends=depends, tensor=names[0] if names else None, constant=tensor)
        _describe(node, tensor)
        current.tensors[id(tensor)] = (tensor, node)
        return node

    def _argument(self, current: _Open, value: Any) -> Any:
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
        return [self._node(current, leaf) for leaf in _values_in(value)]

    # -- sizes

    def _size(self, current: _Open, func: Any, name: str, args: tuple, kwargs: dict) -> Any:
        sizes = self._sizes(current, args[0])
        dim = args[1] if len(args) > 1 and name == "size" else kwargs.get("dim")
        return torch.Size(sizes) if dim is None else sizes[plain(dim)]

    def _sizes(self, current: _Open, tensor: Tensor) -> tuple[Count, ...]:
        source = self._node(current, tensor)
        with torch._C.DisableTorchFunction():
            shape = tuple(tensor.shape)
        counts = []
        for dim, value in enumerate(shape):
            node = current.sizes.get((source, dim))
            if node is None:
                node = current.sizes[source, dim] = current.frame.graph.call_method("size", (source, dim))
                node.meta.update(location=here(), value=value, depends=_NOTHING)
            counts.append(Count(value, node, self))
        return tuple(counts)

    def record_count(self, function: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
        """Integer arithmetic with sizes."""
        value = function(*map(plain, operands))
        if not self._stack:
            return value
        current = self._stack[-1]
        node = current.frame.graph.call_function(function, tuple(self._argument(current, o) for o in operands))
        node.meta.update(location=here(), value=value, depends=_NOTHING)
        return Count(value, node, self)

    def record_use(self, count: Count) -> None:
        """Python takes a size as a plain number."""
        if self._stack:
            current = self._stack[-1]
            guard = Guard(self._node(current, count), plain(count), here())
            if guard not in current.frame.guards:
                current.frame.guards.append(guard)


def _fresh(result: Any, args: tuple) -> Any:
    """The result, with a tensor that is an argument itself as a new object: nodes are told by the tensors' identity."""
    if isinstance(result, Tensor):
        if any(result is arg for arg in args):
            with torch._C.DisableTorchFunction():
                return result.view(result.shape) if result.layout is torch.strided else result
        return result
    if type(result) in (tuple, list):
        return type(result)(_fresh(item, args) for item in result)
    return result


def _leaf_values(value: Any) -> Iterator[Any]:
    """Tensors and sizes in the order in which `Recorder._leaves` takes them out."""
    if isinstance(value, (Tensor, Count)):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaf_values(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaf_values(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _leaf_values(getattr(value, field.name))


def _describe(node: fx.Node, value: Any) -> None:
    if isinstance(value, Tensor):
        with torch._C.DisableTorchFunction():
            node.meta["shape"] = tuple(value.shape)
    else:
        node.meta["value"] = plain(value)


def _plain(value: Any) -> Any:
    """The same with sizes as ordinary integers."""
    if isinstance(value, Count):
        return plain(value)
    if isinstance(value, (tuple, list)) and any(not isinstance(item, Tensor) for item in value):
        items = [_plain(item) for item in value]
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if type(value) is dict:
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*map(_plain, (value.start, value.stop, value.step)))
    return value


def _values_in(value: Any, depth: int = 6) -> Iterator[Any]:
    """All tensors and sizes in an object."""
    if isinstance(value, (Tensor, Count)):
        yield value
    elif value is None or isinstance(value, (int, float, str, bytes, type, nn.Module, torch.dtype)) or depth == 0:
        return
    elif isinstance(value, (tuple, list, set)):
        for item in value:
            yield from _values_in(item, depth - 1)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _values_in(item, depth - 1)
    elif hasattr(value, "__dict__") and not callable(value):
        for item in vars(value).values():
            yield from _values_in(item, depth - 1)


def _without_batch_statistics(name: str, args: tuple, kwargs: dict) -> dict:
    """Batch statistics of one example are not defined; the recorded call keeps its own mode."""
    if name == "batch_norm" and kwargs.get("training") and args[1] is not None:
        return {**kwargs, "training": False}
    return kwargs


def _python_random_state() -> Any:
    numpy = sys.modules.get("numpy")
    state = None if numpy is None else numpy.random.get_state()
    return random.getstate(), None if state is None else (state[1].tobytes(), *state[2:])


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: plain(value)
        for name, value in vars(module).items()
        if name not in ("training", "forward") and isinstance(value, (int, float, str, bool, type(None)))
    }
