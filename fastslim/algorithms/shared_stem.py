"""The stem of a step's passes, run once: each pass reads the first channels of it, its backward pass sums theirs.

A convolution of the images, batch norms, activations, pools and depthwise convolutions compute every channel by
itself, so the widest pass's hold those of all others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastslim import errors
from fastslim.graph import ExecutionPlan, Stem
from fastslim.nn import SlimBatchNorm2d, SlimConv2d
from fastslim.ops.step_buffers import StepBuffers, autocast_dtype_on

if TYPE_CHECKING:
    from fastslim.algorithms.joint_training import JointTraining

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_REPORTED = ("stem shared", "stem not shared")


def outside_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Around a backward pass: gradients are computed in the types of the forward pass, as torch advises."""
    on = autocast_dtype_on(device.type) is not None
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()


def reason_against(algo: JointTraining, wrapper: Any = None) -> str:
    """Why an algorithm's passes cannot share their stem; empty if they can."""
    plan = algo._plan
    if not algo.share_stem:
        return "share_stem=False"
    if not isinstance(plan, ExecutionPlan):
        return "there is no execution plan"
    if not isinstance(plan.stem, Stem):
        return plan.stem
    if algo.has_modes:
        return "the network makes its losses itself"
    if algo.cuda_graphs or algo.overlap_students:
        return f"{'cuda_graphs' if algo.cuda_graphs else 'overlap_students'}=True: passes stand for themselves"
    if wrapper is not None:
        return "an optim wrapper may change the weights between two passes"
    if not algo.training:
        return "the algorithm is in evaluation mode"
    modules = plan.stem.modules
    if any("forward" in vars(module) for module in modules):
        return "a layer of it has a forward of its own"
    parameters = [p for module in modules for p in module.parameters()]
    if any(getattr(module, hooks) for module in modules for hooks in _HOOKS) or any(
        getattr(p, hooks, None) for p in parameters for hooks in _PARAMETER_HOOKS
    ):
        return "a layer of it has a hook"
    return ""


def report_stem(algo: JointTraining, reason: str) -> None:
    """Puts into the plan's report whether the stem is shared, or why it is not."""
    plan: Any = algo._plan
    line = f"{_REPORTED[1]}: {reason}" if reason else f"{_REPORTED[0]} by all passes: {', '.join(plan.stem.calls)}"
    if line not in algo.plan_report:
        algo.plan_report = [other for other in algo.plan_report if not other.startswith(_REPORTED)] + [line]


@contextlib.contextmanager
def sharing_stem(
    algo: JointTraining, subnets: Mapping[str, Mapping[str, int]], buffers: StepBuffers, wrapper: Any
) -> Iterator[SharedStem | None]:
    """Around the passes of a step: their execution plan runs the stem in the first of them only.

    Yields:
        What :meth:`SharedStem.backward` is to be called of behind the last pass; None where nothing is shared.
    """
    reason = reason_against(algo, wrapper)
    report_stem(algo, reason)
    if reason or len(subnets) < 2:
        yield None
        return
    plan: Any = algo._plan
    widths = dict.fromkeys(plan.stem.convs, 0)
    for index, choices in enumerate(subnets.values()):
        algo.choose_subnet(index, choices)
        for conv, width in widths.items():
            widths[conv] = max(width, conv.active_out)
    plan.shared = shared = SharedStem(plan, widths, buffers)
    try:
        yield shared
        if shared.refusal:
            report_stem(algo, f"in the last step, {shared.refusal}")
    finally:
        plan.shared = None


class SharedStem:
    """The stem of one step.

    Args:
        plan: runs the network; it calls this object instead of its own forward.
        widths: the largest of all passes, of every convolution of the stem.
        buffers: where the gradients of parameters go.

    Attributes:
        refusal: why some pass ran the stem itself; empty when none did.
    """

    def __init__(self, plan: ExecutionPlan, widths: Mapping[SlimConv2d, int], buffers: StepBuffers) -> None:
        assert isinstance(plan.stem, Stem)
        self._plan, self._stem, self._widths, self._buffers = plan, plan.stem, widths, buffers
        self._inputs: list[Any] = []
        self._state: Any = None
        self._statistics: dict[SlimBatchNorm2d, tuple[Tensor, Tensor]] = {}
        self._values: list[_Value] = []
        self._called = False
        self._refusal = ""

    @property
    def refusal(self) -> str:
        """See above."""
        return self._refusal if self._called else "the network's own forward ran"

    def __call__(self, inputs: list[Any]) -> Any:
        """The network's output at the present width."""
        self._called = True
        if refusal := self._reason_against(inputs):
            self._refusal = refusal
            return self._plan.run(inputs)
        if not self._values:
            self._run(inputs)
        self._update_statistics()
        prefixes = [value.prefix(_width(w)) for value, w in zip(self._values, self._stem.widths, strict=True)]
        return self._stem.rest(self._plan._model, *prefixes, *inputs)

    def backward(self) -> None:
        """The stem's backward pass, of the sum of all passes' gradients."""
        received = [(value.tensor, value.gradient) for value in self._values if value.gradient is not None]
        self._values = []
        if not received:
            return
        tensors = [tensor for tensor, _ in received]
        gradients = [gradient.to(tensor.dtype) for tensor, gradient in received]
        del received
        with self._buffers.active(), outside_autocast(tensors[0].device):
            torch.autograd.backward(tensors, gradients)
        self._buffers.end_pass()

    def _reason_against(self, inputs: Sequence[Any]) -> str:
        """Why a pass cannot take part; empty if it can."""
        if not torch.is_grad_enabled():
            return "a pass ran without gradients"
        if any(inputs[read].dim() != 4 for read in self._stem.reads):
            return "its input was no batch of images"
        if any(conv.segments is not None or conv.out_segments is not None for conv in self._widths) or any(
            norm.segments is not None for norm, _ in self._stem.norms
        ):
            return "channels of a pass were not the first ones"
        if any(_width(w) == -1 for w in (*self._stem.widths, *(w for _, w in self._stem.norms))):
            return "layers of a pass that belong together had different widths"
        if any(conv.active_out > width for conv, width in self._widths.items()):
            return "a pass had a width of its own"
        state = self._state_with(inputs)
        if not self._values:
            self._state, self._inputs = state, list(inputs)
        elif state != self._state or any(inputs[read] is not self._inputs[read] for read in self._stem.reads):
            return "a pass had an input, weights or modes of its own"
        return ""

    def _state_with(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """What the stem's values depend on besides its input's identity."""
        tensors = [inputs[read] for read in self._stem.reads]
        precision = autocast_dtype_on(tensors[0].device.type)
        tensors += [p for module in self._stem.modules for p in module.parameters()]
        versions = [None if tensor.is_inference() else tensor._version for tensor in tensors]
        return precision, versions, [norm.training for norm, _ in self._stem.norms]

    def _run(self, inputs: Sequence[Any]) -> None:
        with _at(self._widths), _kept_apart(norm for norm, _ in self._stem.norms) as self._statistics:
            self._values = [_Value(tensor) for tensor in self._stem.run(self._plan._model, *inputs)]

    def _update_statistics(self) -> None:
        """What the batch norms of a pass that runs them would do to their running statistics."""
        by_factor: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for norm, convs in self._stem.norms:
            if norm in self._statistics:
                width = _width(convs)
                running, batch = by_factor.setdefault(norm._average_factor(), ([], []))
                running += [norm.running_mean[:width], norm.running_var[:width]]
                batch += [statistic[:width] for statistic in self._statistics[norm]]
        for factor, (running, batch) in by_factor.items():
            torch._foreach_mul_(running, 1 - factor)
            torch._foreach_add_(running, batch, alpha=factor)


class _Value:
    """A value of the stem, and the sum of the gradients of its prefixes."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._version = tensor, tensor._version
        self._anchor = tensor.detach().new_empty(0).requires_grad_()
        self.gradient: Tensor | None = None

    def prefix(self, width: int | None) -> Tensor:
        """Its first channels, for one pass."""
        if self.tensor._version != self._version:
            raise errors.FastslimRuntimeError(
                "a layer has changed the stem's output, which all passes share, in place; use share_stem=False"
            )
        if not self.tensor.requires_grad:
            return self.cut(width)
        prefix: Tensor = _Prefix.apply(self._anchor, self, width)
        return prefix

    def cut(self, width: int | None) -> Tensor:
        """The first channels as memory of their own; all of them as they are."""
        whole = self.tensor.detach()
        if width is None or width == whole.shape[1]:
            return whole
        # oneDNN takes a strided part, but slowly: a step of ResNet-18, 16 images of 112 px, 1.08 times as long.
        nhwc = not whole.is_contiguous() and whole.is_contiguous(memory_format=torch.channels_last)
        return whole[:, :width].contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)

    def add(self, gradient: Tensor) -> None:
        """Adds the gradient of a prefix."""
        width = gradient.shape[1]
        if self.gradient is not None:
            self.gradient[:, :width] += gradient
            return
        # The sum of 16-bit gradients must not be rounded once a pass.
        dtype = torch.promote_types(self.tensor.dtype, torch.float32)
        self.gradient = torch.empty_like(self.tensor, dtype=dtype, requires_grad=False)
        self.gradient[:, :width].copy_(gradient)
        self.gradient[:, width:].zero_()


class _Prefix(torch.autograd.Function):
    """Hands the gradient to a sum. As a leaf, the prefix would get a copy of it in another memory format."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: _Value, width: int | None) -> Tensor:
        ctx.value = value
        return value.cut(width)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.value.add(gradient)
        return None, None, None


def _width(convs: Sequence[SlimConv2d]) -> int | None:
    """The present width of values that these convolutions make; None for all channels, -1 if they disagree."""
    widths = {conv.active_out for conv in convs}
    return None if not widths else widths.pop() if len(widths) == 1 else -1


@contextlib.contextmanager
def _at(widths: Mapping[SlimConv2d, int]) -> Iterator[None]:
    """Other widths for a while."""
    present = {conv: conv.active_out for conv in widths}
    try:
        for conv, width in widths.items():
            conv.active_out = width
        yield
    finally:
        for conv, width in present.items():
            conv.active_out = width


@contextlib.contextmanager
def _kept_apart(norms: Iterable[SlimBatchNorm2d]) -> Iterator[dict[SlimBatchNorm2d, tuple[Tensor, Tensor]]]:
    """Batch norms leave their running statistics alone; the batch's are yielded, of those that would update them."""
    statistics: dict[SlimBatchNorm2d, tuple[Tensor, Tensor]] = {}
    present = []
    try:
        for norm in norms:
            if not norm.training or not norm.track_running_stats or norm.running_mean is None:
                continue
            present.append((norm, norm.momentum, dict(norm._buffers)))
            mean, var = statistics[norm] = torch.zeros_like(norm.running_mean), torch.zeros_like(norm.running_var)
            # With momentum 1 a running statistic becomes the batch's.
            norm.momentum = 1.0
            norm._buffers.update(running_mean=mean, running_var=var, num_batches_tracked=None)
        yield statistics
    finally:
        for norm, momentum, tensors in present:
            norm.momentum = momentum
            norm._buffers.update(tensors)
