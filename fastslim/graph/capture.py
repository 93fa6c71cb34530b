"""Run a model's forward once on example inputs and record it, frame by frame."""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import traceback
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastslim.errors import FastslimRuntimeError, FastslimTypeError
from fastslim.graph.counts import noticing_ranges
from fastslim.graph.frame import Captured, Frame, user_location
from fastslim.graph.frame_nodes import DataDependentError
from fastslim.graph.recorder import Recorder


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
    if isinstance(model, torch.jit.ScriptModule):
        raise FastslimTypeError(
            f"{model.original_name} is compiled by TorchScript, and its forward cannot be followed; pass the Python "
            "module it was made from"
        )
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
        if value.is_meta and not weight.is_meta:
            raise FastslimTypeError("example_inputs lie on the meta device and hold no data; use torch.zeros")
        return value.detach().to(weight.device, weight.dtype if value.is_floating_point() else None)

    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise FastslimTypeError(
            f"example_inputs do not fit {type(model).__name__}.forward{inspect.signature(model.forward)}: {error}"
        ) from error
    return {name: torch.utils._pytree.tree_map(move, value) for name, value in bound.arguments.items()}


_COLLECTIONS = (dict, OrderedDict, list, set)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restores everything a forward may change: modes, attributes, hooks, buffers, random state."""
    modules: list[tuple[dict, dict, list[tuple[Any, Any]]]] = [
        # Parameters, submodules and hooks are in dicts among the attributes; other collections are the user's own.
        (m.__dict__, dict(m.__dict__), [(v, copy.copy(v)) for v in vars(m).values() if type(v) in _COLLECTIONS])
        for m in model.modules()
        if not isinstance(m, torch.jit.ScriptModule)
    ]
    scripted = [(m, m.training) for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = {b.device.index or 0 for b in (*model.buffers(), *model.parameters()) if b.is_cuda}
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        for attributes, saved_attributes, collections in modules:
            for collection, saved in ((attributes, saved_attributes), *collections):
                collection.clear()
                (collection.extend if isinstance(collection, list) else collection.update)(saved)
        for module, training in scripted:
            module.training = training
        with torch.no_grad():
            for buffer, saved_buffer in buffers:
                buffer.copy_(saved_buffer)


def record(
    model: nn.Module, inputs: Mapping[str, Any], recorder: Recorder, training: bool
) -> tuple[Frame, list[fx.Node]]:
    """One recorded run in a mode; the model is left exactly as it was."""
    with unchanged(model), torch.enable_grad(), _quiet(), noticing_ranges():
        model.train(training)
        return recorder.run(inputs)


def capture(
    model: nn.Module, inputs: Mapping[str, Any], *, training: bool = False, opaque: frozenset[str] = frozenset()
) -> Captured:
    """Records the model's forward as it runs with ``self.training == training``; layers themselves run in eval mode.

    Submodules that decide by the values of a tensor are not looked into.

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
    reasons = dict.fromkeys(opaque, "excluded by the caller")
    while True:
        recorder = Recorder(model, reasons)
        try:
            root, outputs = record(model, inputs, recorder, training)
            return Captured(root, model, outputs, training, reasons)
        except DataDependentError as error:
            if not error.module or error.module in reasons:
                raise FastslimRuntimeError(
                    f"{type(model).__name__} cannot be traced: {error}. Move that line into a submodule of its own; "
                    "the submodule then stays at full width"
                ) from None
            reasons[error.module] = str(error)
        except Exception as error:
            raise _cannot(model, recorder.failed_in, error) from error


def _cannot(model: nn.Module, module: str | None, error: Exception) -> FastslimRuntimeError:
    frames = reversed(traceback.extract_tb(error.__traceback__))
    where = user_location((f.filename, f.lineno or 0) for f in frames)
    return FastslimRuntimeError(
        f"{type(model).__name__} cannot be traced: {type(error).__name__}: {error} (at {where}"
        + (f", in module {module!r}" if module else "")
        + "). "
        + (
            f"If the example inputs are right, leave the module out with exclude=({module!r},)."
            if module
            else "Do the example inputs have the shapes and types that forward takes?"
        )
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's fused inference paths, which a training forward does not take, and caches keyed by sizes."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    einops = sys.modules.get("einops.einops")
    cached = getattr(einops, "_reconstruct_from_shape", None)
    torch.backends.mha.set_fastpath_enabled(False)
    if hasattr(cached, "__wrapped__"):
        einops._reconstruct_from_shape = cached.__wrapped__  # type: ignore[union-attr]
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        if hasattr(cached, "__wrapped__"):
            einops._reconstruct_from_shape = cached  # type: ignore[union-attr]
