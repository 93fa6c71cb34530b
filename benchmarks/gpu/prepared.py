"""What a kernel benchmark calls: a case, prepared with inputs and by one backend; and how wrong its results are."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from arithmetic import Cost
from torch import Tensor

from fastslim.ops.step_buffers import StepBuffers
from fastslim.ops.weight_cache import Prefix

Outputs = list[Tensor]
Inputs = dict[str, Any]


class Case(NamedTuple):
    """What is measured.

    Attributes:
        op: name of the op.
        direction: "forward", "backward", "backward_input", "backward_weight" or "forward_backward".
        shape: for the reader.
        cost: see :mod:`arithmetic`.
        inputs: ``inputs(device, dtype)``: tensors by name; those of `parameters` are float32.
        call: ``call(inputs) -> output``, through the public op.
        images: names of the inputs a "backward" or "backward_input" differentiates.
        parameters: names of the inputs whose gradients go into the step's buffers.
        asks: the direction under which the op's rule is asked, if that is another.
        packed: (c_out, c_in) of the weight that a step packs at the start of a pass, for all layers together.
    """

    op: str
    direction: str
    shape: str
    cost: Cost
    inputs: Callable[[torch.device, torch.dtype], Inputs]
    call: Callable[[Inputs], Tensor]
    images: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    asks: str = ""
    packed: tuple[int, int] | None = None

    def bytes(self, inputs: Inputs) -> int:
        """What one set of inputs and its output occupies."""
        return 2 * sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor))


class Prepared:
    """A case with one set of inputs, ready to be called any number of times by the backend that was active here.

    Args:
        case: what to compute.
        inputs: its operands, as `case.inputs` makes them.
        dtype: computed in, by autocast; None for the inputs' own.
    """

    def __init__(self, case: Case, inputs: Inputs, dtype: torch.dtype | None) -> None:
        self.case, self.dtype = case, dtype
        wants = {"backward_input": case.images, "backward_weight": case.parameters}
        wanted = wants.get(case.direction, () if case.direction == "forward" else (*case.images, *case.parameters))
        self.inputs = {
            name: value.detach().requires_grad_() if name in wanted else value for name, value in inputs.items()
        }
        self.images = [self.inputs[name] for name in case.images if name in wanted]
        # Gradients of parameters go where a training step puts them.
        self.parameters = [self.inputs[name] for name in case.parameters if name in wanted]
        self.buffers = StepBuffers(self.parameters)
        self.buffers.begin()
        self.device = next(value.device.type for value in inputs.values() if isinstance(value, Tensor))
        if case.packed is not None and dtype is not None:
            self.buffers.weights.pack([(self.inputs["weight"], dtype, Prefix(*case.packed, None))])
        if "backward" in case.direction and case.direction != "forward_backward":
            self.output = self._forward()
            generator = torch.Generator(self.device).manual_seed(1)
            noise = torch.randn(self.output.shape, device=self.device, generator=generator)
            # The same values whatever memory format a backend's output has.
            self.upstream = torch.empty_like(self.output).copy_(noise)

    def _forward(self) -> Tensor:
        enabled = self.dtype is not None and self.dtype != torch.float32
        with self.buffers.active(), torch.autocast(self.device, self.dtype or torch.bfloat16, enabled=enabled):
            return self.case.call(self.inputs)

    def __call__(self) -> Outputs:
        """One call of the direction."""
        if self.case.direction == "forward":
            with torch.no_grad():
                return [self._forward()]
        if self.case.direction == "forward_backward":
            output = self._forward()
            return [output.detach(), *torch.autograd.grad(output.sum(), self.images)]
        # Gradients of parameters reach the buffers and not autograd, so there may be nothing to return.
        self.buffers.drop()  # what the last call has queued for the end of the pass
        gradients = self._gradients()
        return [gradient for gradient in gradients if gradient is not None]

    def _gradients(self) -> list[Tensor | None]:
        wanted = [*self.images, *self.parameters]
        return list(torch.autograd.grad(self.output, wanted, self.upstream, retain_graph=True, allow_unused=True))

    def results(self) -> Outputs:
        """What the first call computes, parameter gradients included, with unwritten memory full of NaN."""
        with poisoned():
            outputs = self()
            self.buffers.finish()
        return [*outputs, *(p.grad.detach().clone() for p in self.parameters if p.grad is not None)]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fills what torch.empty returns with NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def relative_error(values: Outputs, truth: Outputs) -> float:
    """Largest error of one result in the 2-norm; NaN and missing results count as infinite."""
    if len(values) != len(truth):
        return float("inf")
    worst = 0.0
    for value, true in zip(values, truth, strict=True):
        error = float((value.float() - true.float()).norm() / true.float().norm().clamp_min(1e-30))
        worst = max(worst, error if error == error else float("inf"))
    return worst
