"""Passes that do the same in every step, captured as CUDA graphs and replayed."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fastslim import errors
from fastslim.algorithms.base import Batch
from fastslim.ops.step_buffers import GradientSlot, StepBuffers, autocast_dtype_on

if TYPE_CHECKING:
    from fastslim.algorithms.joint_training import JointTraining

Result = tuple[dict[str, Tensor], Any]
#: Runs a function while its launches are recorded; returns what repeats them, and the function's result.
Capture = Callable[[Callable[[], Result]], tuple[Callable[[], None], Result]]
EAGER_STEPS = 3  # libraries choose their algorithms and workspaces, buffers are made
MOST_SEEN = 256  # forms of passes that are counted
MOST_GRAPHS = 8  # each holds its activations for good


class Pass(Protocol):
    """A pass whose widths are chosen."""

    name: str
    batch: Batch
    teacher: Any
    scale: float

    def run(self, batch: Batch | None = None, teacher: Any = None, scale: Tensor | None = None) -> Result:
        """Losses and output, of the pass's own batch, teacher and factor or others of their shapes."""


class _Graph:
    """A captured pass: its launches, the memory it reads its batch and teacher from, and what it leaves behind."""

    def __init__(self, one: Pass, buffers: StepBuffers, capture: Capture) -> None:
        # The teacher's output lies elsewhere in a step whose max pass was not replayed, or was by another graph.
        self._inputs = _map(_inputs(one), lambda tensor: tensor.clone())
        # A loss scaler changes its factor now and then, which is no reason for another graph.
        self._scale = None if one.scale == 1.0 else torch.tensor(one.scale, dtype=torch.float64, device=buffers.device)
        fresh, gradients = buffers.fresh(), [p.grad for p in buffers.parameters]
        try:
            self._replay, self._result = capture(lambda: one.run(**self._inputs, scale=self._scale))
            if any(p.grad is not None and p.grad is not buffers.slot(p).view for p in buffers.parameters):
                raise errors.FastslimRuntimeError("a sparse gradient is a new tensor each time")
            self._written: list[GradientSlot] = [slot for slot in fresh if not slot.fresh]
        except BaseException:  # what was collected has never been computed
            buffers.drop()
            buffers.weights.forget()
            for p, gradient in zip(buffers.parameters, gradients, strict=True):
                p.grad = gradient
            raise
        finally:
            for slot in fresh:  # nothing has run yet
                slot.fresh = True

    def run(self, one: Pass) -> Result:
        for static, tensor in zip(_tensors(self._inputs), _tensors(_inputs(one)), strict=True):
            static.copy_(tensor, non_blocking=True)
        if self._scale is not None:
            self._scale.fill_(one.scale)
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
        self._stream: torch.cuda.Stream | None = None
        self._refused: dict[str, str] = {}

    @property
    def report(self) -> list[str]:
        """One line per captured pass, and why passes are not captured."""
        lines = [f"{key[0]}: captured for {', '.join(str(tuple(form[0])) for form in key[1])}" for key in self._graphs]
        return lines + [f"{name}: {reason}" for name, reason in self._refused.items()]

    def run(self, algo: JointTraining, buffers: StepBuffers, one: Pass, choices: Mapping[str, int]) -> Result:
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
            if len(self._seen) > MOST_SEEN:  # something differs in every step, such as a buffer's memory
                self._seen.clear()
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] <= EAGER_STEPS or len(self._graphs) >= MOST_GRAPHS:
                return one.run()
            graph = self._captured(key, one, buffers)
            if graph is None:
                return one.run()
        return graph.run(one)

    def _refusal(self, algo: JointTraining, one: Pass, buffers: StepBuffers) -> str | None:
        if not algo.cuda_graphs:
            return "cuda_graphs=False"
        if one.name in self._refused:
            return self._refused[one.name]
        if self._capture is None and buffers.device.type != "cuda":
            return f"the parameters are on {buffers.device}, and graphs are captured on a GPU"
        if algo.distiller is not None:
            return "a distiller's recorders look at tensors in Python, which a replay does not run"
        if len({device for _, device in buffers.flat}) > 1:
            return "the parameters are on several devices, and a graph is captured on one"
        tensors = _tensors(one.batch)
        if tensors is None or any(tensor.device != buffers.device for tensor in tensors):
            return f"inputs and targets must be tensors on {buffers.device}"
        return None

    def _key(self, algo: JointTraining, buffers: StepBuffers, one: Pass, choices: Mapping[str, int]) -> Any:
        """Everything a captured pass has taken for granted."""
        forms = tuple((t.shape, t.stride(), t.dtype) for t in _tensors(one.batch) or ())
        precision = autocast_dtype_on(buffers.device.type)
        fresh = frozenset(map(id, buffers.fresh()))
        modes: list[bool] = []
        memory: list[int] = []
        for module in algo.architecture.modules():
            modes.append(module.training)
            tensors = (*module._parameters.values(), *module._buffers.values())
            memory.extend(tensor.data_ptr() for tensor in tensors if tensor is not None)
        return one.name, forms, tuple(choices.items()), precision, one.scale == 1.0, fresh, tuple(modes), tuple(memory)

    def _captured(self, key: Any, one: Pass, buffers: StepBuffers) -> _Graph | None:
        try:
            capture = self._capture or functools.partial(self._cuda_capture, buffers.device)
            graph = self._graphs[key] = _Graph(one, buffers, capture)
        except RuntimeError as error:  # what cannot be captured, or torch.OutOfMemoryError
            self._refused[one.name] = f"capturing it failed: {error}"
            warnings.warn(f"the {one.name} pass runs without a CUDA graph: {error}", stacklevel=6)
            return None
        return graph

    def _cuda_capture(self, device: torch.device, function: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        graph = torch.cuda.CUDAGraph()
        cached = torch.is_autocast_cache_enabled()
        generator = torch.cuda.default_generators[device.index]
        random_state = generator.clone_state()
        # A cast that autocast keeps from outside, or hands on to the outside, would be stale at a replay.
        torch.set_autocast_cache_enabled(False)
        torch.clear_autocast_cache()
        try:
            # torch captures on the current device, and a capture that fails leaves its stream current. What
            # other threads do meanwhile, such as pinning the next batch's memory, is no error.
            with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
                self._stream = self._stream or torch.cuda.Stream(device)
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    result = function()
        except BaseException:  # and random numbers refused: the generator takes itself for captured
            generator.graphsafe_set_state(random_state)
            raise
        finally:
            torch.set_autocast_cache_enabled(cached)
        self._pool = graph.pool()  # passes follow one another, so they can share their activations' memory
        return graph.replay, result


def _inputs(one: Pass) -> dict[str, Any]:
    """What a pass reads that differs from step to step."""
    inputs = {"batch": one.batch, "teacher": one.teacher}
    return {name: value for name, value in inputs.items() if value is not None}


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
