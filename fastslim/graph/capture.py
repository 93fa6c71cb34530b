"""Run a model's forward once on example inputs and record it as a torch.fx graph with shapes and source lines."""

from __future__ import annotations

import contextlib
import inspect
import random
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fastslim.errors import FastslimRuntimeError, FastslimTypeError

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)


@dataclass
class Captured:
    """A recorded forward.

    Attributes:
        graph: nodes carry ``meta``: "is_tensor", "shape", "value" (numbers, shapes) and "location" (file:line).
        model: the model the node targets refer to; it is not changed.
        baked: places where the forward turned a size into a Python number or a branch; the recorded graph holds
            for the example's sizes only when this is not empty.
        draws: place before which the forward drew random numbers in Python, whose outcome a recording would freeze.
    """

    graph: fx.Graph
    model: nn.Module
    baked: dict[fx.Node, str] = field(default_factory=dict)
    draws: str | None = None


def bind_inputs(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """Names the example inputs after forward's parameters and moves them to the model's device and float dtype.

    Args:
        model: the network to be traced.
        example_inputs: a tensor, a tuple or list of positional arguments, a dict of keyword arguments, or the shape
            of a single image batch such as ``(1, 3, 224, 224)``.

    Returns:
        Forward's arguments by parameter name, in the order of its signature.

    Raises:
        FastslimTypeError: when they do not fit forward's signature, or are no tensors.
    """
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if isinstance(example_inputs, Sequence) and len(example_inputs) and all(type(n) is int for n in example_inputs):
        example_inputs = torch.zeros(tuple(example_inputs), dtype=weight.dtype, device=weight.device)
    args: tuple = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    elif isinstance(example_inputs, Tensor):
        args = (example_inputs,)
    else:
        raise FastslimTypeError(
            "example_inputs must be a tensor, a tuple of arguments, a dict of keyword arguments or a shape such as "
            f"(1, 3, 224, 224), but got {type(example_inputs).__name__}"
        )

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(weight.device, weight.dtype if value.is_floating_point() else None)

    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise FastslimTypeError(
            f"example_inputs do not fit {type(model).__name__}.forward{inspect.signature(model.forward)}: {error}"
        ) from error
    return {name: torch.utils._pytree.tree_map(move, value) for name, value in bound.arguments.items()}


def user_location(frames: Iterator[tuple[str, int]]) -> str:
    """The first of the (file, line) pairs that is neither torch's nor this package's, as ``file:line``."""
    for filename, line in frames:
        if not filename.startswith((_TORCH, _HERE, "<")):
            return f"{filename}:{line}"
    return "unknown line"


def _stack() -> Iterator[tuple[str, int]]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]


class _KnownProxy(fx.Proxy):
    """Numbers behind a proxy: sizes are known while tracing, so Python may ask for them."""

    node: fx.Node
    tracer: _Recorder

    def _number(self) -> Any:
        value = self.tracer.values[self.node]
        if isinstance(value, Tensor):
            raise fx.proxy.TraceError("a Python number is taken from a tensor's data")
        self.tracer.baked[self.node] = user_location(_stack())
        return value

    def __int__(self) -> int:
        return int(self._number())

    def __index__(self) -> int:
        return int(self._number())

    def __float__(self) -> float:
        return float(self._number())

    def __len__(self) -> int:
        value = self.tracer.values[self.node]
        if isinstance(value, Tensor):
            self.tracer.baked[self.node] = user_location(_stack())
        return len(value)

    def __getattr__(self, name: str) -> Any:
        if name in ("ndim", "is_cuda"):
            return getattr(self.tracer.values[self.node], name)
        return _KnownAttribute(self, name)


class _KnownAttribute(_KnownProxy, fx.proxy.Attribute):
    """An attribute such as ``x.shape``."""


class _Recorder(fx.Tracer):
    """Records forward while running it: every node's value is known, so shapes may steer Python code."""

    def __init__(self, inputs: Mapping[str, Any], opaque: frozenset[str]) -> None:
        super().__init__()
        self.inputs, self.opaque = inputs, opaque
        self.values: dict[fx.Node, Any] = {}
        self.baked: dict[fx.Node, str] = {}
        self.failed_in: str | None = None
        self.draws: str | None = None
        self._random = _random_state()
        self._running = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _KnownProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            isinstance(m, LAYERS)
            or module_qualified_name in self.opaque
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(self, m: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        if self._running:
            return forward(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or self.path_of_module(m)
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        return attr_val if self._running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: fx.Proxy) -> bool:
        if isinstance(self.values[obj.node], Tensor):
            raise fx.proxy.TraceError("data-dependent control flow (a branch on a tensor's values)")
        return bool(cast(Any, obj)._number())

    def iter(self, obj: fx.Proxy) -> Iterator:
        value = self.values[obj.node]
        return (
            iter([cast(Any, obj)[i] for i in range(len(value))])
            if isinstance(value, (tuple, list))
            else super().iter(obj)
        )

    def create_proxy(self, kind: str, target: Any, args: tuple, kwargs: dict, *rest: Any, **named: Any) -> fx.Proxy:
        self.notice_draws(user_location(_stack()))
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        node = proxy.node
        node.meta["location"] = user_location(_stack())
        try:
            self._running = True
            value = self.values[node] = self._run(node)
        finally:
            self._running = False
            self._random = _random_state()
        node.meta["is_tensor"] = isinstance(value, Tensor)
        if isinstance(value, Tensor):
            node.meta["shape"] = tuple(value.shape)
        elif isinstance(value, (int, float)) or (isinstance(value, tuple) and all(type(v) is int for v in value)):
            node.meta["value"] = value
        return proxy

    def reset_random_state(self) -> None:
        """From here on a draw outside the recorded nodes is noticed."""
        self._random = _random_state()

    def notice_draws(self, place: str) -> None:
        """Between two recorded nodes nothing may draw random numbers: the recording would repeat one outcome."""
        if self.draws is None and _random_state() != self._random:
            self.draws = place

    def _value(self, node: fx.Node) -> Any:
        if node not in self.values:  # made by fx itself: a named tuple or dataclass of proxies
            self.values[node] = self._run(node)
        return self.values[node]

    def _run(self, node: fx.Node) -> Any:
        if node.op == "output":
            return None
        if node.op == "placeholder":
            name = str(node.target).lstrip("*")
            return self.inputs[name] if name in self.inputs else (node.args[0] if node.args else None)
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            return getattr(self.root.get_submodule(owner), name)
        args = fx.node.map_arg(node.args, self._value)
        kwargs = fx.node.map_arg(node.kwargs, self._value)
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            modes = [(m, m.training) for m in module.modules()]
            module.eval()  # batch statistics of one example are neither defined nor wanted
            try:
                return module.forward(*args, **kwargs)
            finally:
                for m, mode in modes:
                    m.training = mode
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restores everything a forward may change: modes, attributes, buffers, random state."""
    modules: list[tuple[dict, dict, list[tuple[dict, dict]]]] = [
        (m.__dict__, dict(m.__dict__), [(d, dict(d)) for d in (m._parameters, m._buffers, m._modules)])
        for m in model.modules()
    ]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = {b.device.index or 0 for b in (*model.buffers(), *model.parameters()) if b.is_cuda}
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        for attributes, saved_attributes, tables in modules:
            for table, saved in ((attributes, saved_attributes), *tables):
                table.clear()
                table.update(saved)
        with torch.no_grad():
            for buffer, saved_buffer in buffers:
                buffer.copy_(saved_buffer)


def capture(
    model: nn.Module, inputs: Mapping[str, Any], *, training: bool = False, opaque: frozenset[str] = frozenset()
) -> Captured:
    """Records the model's forward as it runs with ``self.training == training``; layers themselves run in eval mode.

    Args:
        model: any module; left exactly as it was.
        inputs: forward's arguments by name, from `bind_inputs`.
        training: which side of ``if self.training`` is recorded.
        opaque: names of submodules that are not looked into.

    Returns:
        The recorded forward.

    Raises:
        FastslimRuntimeError: when forward fails or cannot be recorded; names the module, the file and the line.
    """
    recorder = _Recorder(inputs, opaque)
    parameters = inspect.signature(model.forward).parameters.values()
    constants = {
        p.name: inputs.get(p.name, p.default)
        for p in parameters
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and not _holds_tensor(inputs.get(p.name, p.default))
    }
    try:
        with unchanged(model), torch.no_grad():
            model.train(training)
            recorder.reset_random_state()
            graph = recorder.trace(model, constants or None)
    except Exception as error:
        frames = reversed(traceback.extract_tb(error.__traceback__))
        where = user_location((f.filename, f.lineno or 0) for f in frames)
        module = recorder.failed_in
        raise FastslimRuntimeError(
            f"{type(model).__name__} cannot be traced: {error} (at {where}"
            + (f", in module {module!r}" if module else "")
            + "). "
            + (
                f"Rewrite that line, or leave the module out with exclude=({module!r},)."
                if module
                else "Rewrite that line, or move it into a submodule and exclude that."
            )
        ) from error
    return Captured(graph, model, recorder.baked, recorder.draws)


def _random_state() -> tuple[bytes, Any]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate()


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in torch.utils._pytree.tree_leaves(value))
