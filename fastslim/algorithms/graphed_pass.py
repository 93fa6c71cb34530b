"""Passes that do the same in every step, captured as CUDA graphs and replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fastslim.algorithms.base import Batch
from fastslim.ops.step_buffers import GradientSlot, StepBuffers, autocast_dtype_on

if TYPE_CHECKING:
    from fastslim.algorithms.autoslim import AutoSlim

Result = tuple[dict[str, Tensor], Any]
#: Runs a function while its launches are recorded; returns what repeats them, and the function's result.
Capture = Callable[[Callable[[], Result]], tuple[Callable[[], None], Result]]
EAGER_STEPS = 3  # libraries choose their algorithms and workspaces, buffers are made
MOST_GRAPHS = 8  # each holds its activations for good


class Pass(Protocol):
    """A pass whose widths are chosen."""

    name: str
    batch: Batch
    scale: float

    def run(self, batch: Batch | None = None) -> Result:
        """Losses and output, of the pass's own batch or another of its shapes."""


class _Graph:
    """A captured pass: its launches, the memory it reads its batch from, and what it leaves behind."""

    def __init__(self, one: Pass, buffers: StepBuffers, capture: Capture) -> None:
        self._batch = _map(one.batch, lambda tensor: tensor.clone())
        fresh = buffers.fresh()
        try:
            self._replay, self._result = capture(lambda: one.run(self._batch))
            self._written: list[GradientSlot] = [slot for slot in fresh if not slot.fresh]
        finally:
            for slot in fresh:  # nothing has run yet
                slot.fresh = True

    def run(self, batch: Batch) -> Result:
        for static, tensor in zip(_tensors(self._batch), _tensors(batch), strict=True):
            static.copy_(tensor, non_blocking=True)
        self._replay()
        for slot in self._written:
            slot.fresh = False
        losses, output = self._result
        return {name: value.clone() for name, value in losses.items()}, output


class GraphedPasses:
    """Captures a pass when its shapes, widths and options have come up often enough, else runs it as ever.

    Args:
        capture: records launches; CUDA's own by default.
    """

    def __init__(self, capture: Capture | None = None) -> None:
        self._capture = capture
        self._seen: dict[Any, int] = {}
        self._graphs: dict[Any, _Graph] = {}
        self._pool: Any = None
        self._refused: dict[str, str] = {}

    @property
    def report(self) -> list[str]:
        """One line per captured pass, and why passes are not captured."""
        lines = [f"{key[0]}: captured for {', '.join(str(tuple(form[0])) for form in key[1])}" for key in self._graphs]
        return lines + [f"{name}: {reason}" for name, reason in self._refused.items()]

    def run(self, algo: AutoSlim, buffers: StepBuffers, one: Pass, choices: Mapping[str, int]) -> Result:
        """Losses and output of a pass.

        Args:
            algo: the algorithm; its options say whether graphs are wanted.
            buffers: where gradients go.
            one: the pass, its widths chosen.
            choices: those widths.
        """
        refusal = self._refusal(algo, one, buffers)
        if refusal is not None:
            if algo.cuda_graphs:
                self._refused[one.name] = refusal
            return one.run()
        key = self._key(algo, buffers, one, choices)
        graph = self._graphs.get(key)
        if graph is None:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] <= EAGER_STEPS or len(self._graphs) >= MOST_GRAPHS:
                return one.run()
            graph = self._captured(key, one, buffers)
            if graph is None:
                return one.run()
        return graph.run(one.batch)

    def _refusal(self, algo: AutoSlim, one: Pass, buffers: StepBuffers) -> str | None:
        if not algo.cuda_graphs:
            return "cuda_graphs=False"
        if one.name in self._refused:
            return self._refused[one.name]
        if self._capture is None and buffers.device.type != "cuda":
            return f"the parameters are on {buffers.device}, and graphs are captured on a GPU"
        if algo.distiller is not None:
            return "a distiller's recorders look at tensors in Python, which a replay does not run"
        tensors = _tensors(one.batch)
        if tensors is None or any(tensor.device != buffers.device for tensor in tensors):
            return f"inputs and targets must be tensors on {buffers.device}"
        return None

    def _key(self, algo: AutoSlim, buffers: StepBuffers, one: Pass, choices: Mapping[str, int]) -> Any:
        """Everything a captured pass has taken for granted."""
        forms = tuple((t.shape, t.stride(), t.dtype) for t in _tensors(one.batch) or ())
        precision = autocast_dtype_on(buffers.device.type)
        fresh = frozenset(map(id, buffers.fresh()))
        modes = tuple(module.training for module in algo.architecture.modules())
        return one.name, forms, tuple(choices.items()), precision, one.scale, fresh, modes

    def _captured(self, key: Any, one: Pass, buffers: StepBuffers) -> _Graph | None:
        try:
            graph = self._graphs[key] = _Graph(one, buffers, self._capture or self._cuda_capture)
        except RuntimeError as error:  # what cannot be captured, or torch.OutOfMemoryError
            self._refused[one.name] = f"capturing it failed: {error}"
            warnings.warn(f"the {one.name} pass runs without a CUDA graph: {error}", stacklevel=6)
            return None
        return graph

    def _cuda_capture(self, function: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        graph = torch.cuda.CUDAGraph()
        cached = torch.is_autocast_cache_enabled()
        # A cast that autocast keeps from outside, or hands on to the outside, would be stale at a replay.
        torch.set_autocast_cache_enabled(False)
        torch.clear_autocast_cache()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                result = function()
        finally:
            torch.set_autocast_cache_enabled(cached)
        self._pool = graph.pool()  # passes follow one another, so they can share their activations' memory
        return graph.replay, result


def _tensors(batch: Any) -> list[Tensor] | None:
    """All tensors of nested tuples and dicts, or None when something else is among them."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if not isinstance(batch, (tuple, list)):
        return None
    parts = [_tensors(part) for part in batch]
    return None if any(part is None for part in parts) else [tensor for part in parts for tensor in part]


def _map(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Batch):
        return Batch(*(_map(part, function) for part in batch))
    if isinstance(batch, Mapping):
        return {name: _map(part, function) for name, part in batch.items()}
    return type(batch)(_map(part, function) for part in batch)
