"""The passes of one sandwich step: the memory they share, their streams and graphs, and what an error leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastslim import errors
from fastslim.algorithms.base import Batch
from fastslim.algorithms.garbage import collection_postponed
from fastslim.algorithms.graphed_pass import GraphedPasses
from fastslim.algorithms.members import members
from fastslim.algorithms.optim_wrapper import announcing
from fastslim.algorithms.shared_stem import outside_autocast, sharing_stem
from fastslim.algorithms.student_streams import StudentStreams
from fastslim.algorithms.task_loss import add_prefix
from fastslim.distillers.interception import detached
from fastslim.mutators.dense_weights import dense_weights
from fastslim.ops.step_buffers import StepBuffers, is_capturing

if TYPE_CHECKING:
    from fastslim.algorithms.joint_training import JointTraining


class SandwichStep:
    """Runs the passes of an algorithm's steps.

    Args:
        algo: says what the losses of a pass are, and chooses widths.
    """

    def __init__(self, algo: JointTraining) -> None:
        self._algo = algo
        self._buffers: StepBuffers | None = None
        self._statistics: list[tuple[Tensor, Tensor]] = []  # every buffer, and its copy
        self._graphs = GraphedPasses()
        self._streams = StudentStreams(None)

    @property
    def graph_report(self) -> list[str]:
        """See :attr:`AutoSlim.graph_report`."""
        return self._graphs.report

    def run(
        self,
        batch: Batch,
        subnets: Mapping[str, Mapping[str, int]],
        *,
        accumulate: bool,
        scale: float,
        wrapper: Any = None,
    ) -> dict[str, Tensor]:
        """All passes on one batch; gradients end up in ``param.grad``.

        Args:
            batch: inputs and targets.
            subnets: choices by the pass's name; the first is the teacher of the others.
            accumulate: keep the gradients that are there.
            scale: factor of every pass's loss.
            wrapper: an mmengine optim wrapper that every pass updates with; it may step after any of them.

        Returns:
            The detached losses, ``"<pass>.<loss>"``.
        """
        if is_capturing():
            raise errors.FastslimRuntimeError(
                "a CUDA graph is being captured, and a sandwich step draws new widths every time: a replay would "
                "repeat these. Call train_step outside; AutoSlim(cuda_graphs=True) captures the passes that repeat"
            )
        algo = self._algo
        parameters, statistics = members(algo)  # a connector may have a batch norm, too
        buffers = self._fitting_buffers(parameters)
        # A wrapper may change the weights after any pass: passes then follow one another.
        streams = self._streams if wrapper is None else StudentStreams(None)
        losses: dict[str, Tensor] = {}
        with (
            collection_postponed(),
            self._untouched_on_error(buffers, statistics),
            streams.step(),
            sharing_stem(algo, subnets, buffers, wrapper) as stem,
        ):
            buffers.begin(accumulate=accumulate)
            teacher: Any = None
            for index, (name, choices) in enumerate(subnets.items()):
                algo.choose_subnet(index, choices)
                if wrapper is not None and index:
                    buffers.begin(accumulate=True)
                with streams.of_pass(index):
                    if buffers.packs_for(batch.tensors()):
                        buffers.weights.pack(dense_weights(algo.mutator), streams.lane)
                    one = _Pass(self, buffers, name, batch, teacher, scale, wrapper, streams)
                    repeats = index <= 1 and wrapper is None  # max and min subnet; the others are drawn anew
                    own, output = self._graphs.run(algo, buffers, one, choices) if repeats else one.run()
                if index == 0:
                    teacher = output
                losses.update(add_prefix(own, name))
            if stem is not None:
                stem.backward()
            if wrapper is None:
                self.finish(buffers)
        if algo.distiller is not None:
            algo.distiller.clear()
        algo.mutator.set_max_choices()
        return losses

    def finish(self, buffers: StepBuffers) -> None:
        """Puts the gradients behind ``param.grad``, averaged over all processes."""
        buffers.finish()
        if self._algo.ranks is not None:
            self._algo.ranks.average(buffers)

    def update(self, losses: Mapping[str, Tensor], buffers: StepBuffers, wrapper: Any) -> None:
        """Hands the sum of a pass's losses to an optim wrapper, which runs the backward pass and may step then."""
        synchronizes = wrapper.should_sync()

        def ended() -> None:
            buffers.end_pass()
            buffers.finish()
            if synchronizes and self._algo.ranks is not None:
                self._algo.ranks.average(buffers)

        wrapper.update_params(announcing(_total(losses), ended))

    def backward(self, losses: Mapping[str, Tensor], scale: float | Tensor) -> None:
        """Backward pass of the sum of a pass's losses."""
        total = _total(losses)
        with outside_autocast(total.device):
            if isinstance(scale, Tensor):
                total = total * scale.to(total.dtype)
            elif scale != 1.0:
                total = total * scale
            total.backward()

    def _fitting_buffers(self, parameters: list[nn.Parameter]) -> StepBuffers:
        if self._buffers is None or not self._buffers.matches(parameters):
            self._buffers = StepBuffers(parameters)
            self._graphs = GraphedPasses()
            self._streams = StudentStreams(self._buffers.device if self._algo.overlap_students else None)
        return self._buffers

    def _remember_statistics(self, now: list[Tensor]) -> None:
        fits = len(now) == len(self._statistics) and all(
            buffer is known and buffer.shape == copy.shape and buffer.dtype == copy.dtype
            for buffer, (known, copy) in zip(now, self._statistics, strict=True)
        )
        if not fits:
            self._statistics = [(buffer, torch.empty_like(buffer)) for buffer in now]
        _copy_all(self._statistics)

    @contextlib.contextmanager
    def _untouched_on_error(self, buffers: StepBuffers, statistics: list[Tensor]) -> Iterator[None]:
        """If a pass fails, running statistics go back to what they were and gradients are dropped.

        The copies are there before the step begins, so this works when memory has run out.
        """
        self._remember_statistics(statistics)
        try:
            yield
        except BaseException:
            _copy_all([(copy, buffer) for buffer, copy in self._statistics])
            buffers.drop()
            for p in buffers.parameters:
                p.grad = None
            if self._algo.distiller is not None:
                self._algo.distiller.clear()
            self._algo.mutator.set_max_choices()
            raise


class _Pass:
    """Forward and backward of one subnet, with the widths chosen already; without a teacher, of the max subnet."""

    def __init__(
        self,
        step: SandwichStep,
        buffers: StepBuffers,
        name: str,
        batch: Batch,
        teacher: Any,
        scale: float,
        wrapper: Any,
        streams: StudentStreams,
    ) -> None:
        self.name, self.batch, self.scale, self._wrapper = name, batch, scale, wrapper
        self._step, self._buffers, self.teacher, self._streams = step, buffers, teacher, streams

    def run(
        self, batch: Batch | None = None, teacher: Any = None, scale: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Any]:
        """The detached losses and, of the max subnet, the detached output.

        Args:
            batch: instead of the pass's own, of the same shapes.
            teacher: likewise.
            scale: likewise, in the device's memory.
        """
        step, first, wrapper = self._step, self.teacher is None, self._wrapper
        try:
            with self._buffers.active():
                with contextlib.nullcontext() if wrapper is None else wrapper.optim_context(step._algo):
                    own, output = step._algo.losses_of_pass(
                        batch or self.batch, self.teacher if teacher is None else teacher, first=first
                    )
                self._streams.forward_done()
                if wrapper is not None:
                    step.update(own, self._buffers, wrapper)
                else:
                    step.backward(own, self.scale if scale is None else scale)
        except errors.FastslimError as error:
            raise type(error)(f"in the {self.name} pass: {error}") from error
        self._buffers.end_pass()
        return {key: value.detach() for key, value in own.items()}, detached(output) if first else None


def _total(losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of a pass's losses; on the CPU it must be finite."""
    total: Any = sum(value for key, value in losses.items() if "loss" in key)
    if not isinstance(total, Tensor):
        raise errors.FastslimValueError(
            f"none of {sorted(losses)} has 'loss' in its name, and only such entries are trained"
        )
    # On an accelerator this check would wait for the device in every pass.
    if total.device.type == "cpu" and not bool(torch.isfinite(total)):
        raise errors.FastslimRuntimeError(
            f"the loss is {float(total.detach())}; parameters and statistics are as before the step, "
            "gradients accumulated so far are dropped. Lower the learning rate, or clip the gradients"
        )
    return total


def _copy_all(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copies the first of every pair into the second, with few launches."""
    groups: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for source, target in pairs:
        sources, targets = groups.setdefault((source.dtype, source.device), ([], []))
        sources.append(source)
        targets.append(target)
    with torch.no_grad():
        for sources, targets in groups.values():
            torch._foreach_copy_(targets, sources)
