"""Students of a step on two streams of a GPU: one's backward pass overlaps the next one's forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class StudentStreams:
    """Orders the passes of a step on two streams that live on from step to step.

    Forward passes follow one another, since each updates the running statistics that the next one
    updates further; so do backward passes, which add to the same gradients. The results are those
    of passes one after the other, bit for bit. Nothing that a pass makes outlives the step but
    behind a wait, so tensors need not be recorded for several streams.

    Args:
        device: where the passes run; None, or a device that is no GPU, leaves them on the current stream.
    """

    def __init__(self, device: torch.device | None) -> None:
        on_gpu = device is not None and device.type == "cuda"
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if on_gpu else []
        self._forward: torch.cuda.Event | None = None  # of the student before
        self._backward: torch.cuda.Event | None = None
        self._own_forward: torch.cuda.Event | None = None
        self._pass = 0

    @property
    def lane(self) -> int:
        """Number of the stream that the current pass runs on."""
        return self._pass % 2

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around all passes: afterwards the current stream waits for them, also when one has failed."""
        self._forward = self._backward = None
        try:
            yield
        finally:
            for stream in self._streams:
                torch.cuda.current_stream(stream.device).wait_stream(stream)

    @contextlib.contextmanager
    def of_pass(self, index: int) -> Iterator[None]:
        """Runs a pass on its stream: the teacher (0) on the current one, students by turns on the two others."""
        self._pass, self._own_forward = index, None
        if not self._streams or index == 0:
            yield
            return
        stream = self._streams[self.lane]
        if index <= 2:  # the teacher's pass, and whatever came before the step
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            if self._forward is not None:
                stream.wait_event(self._forward)
            yield
            self._backward = stream.record_event()
            self._forward = self._own_forward or self._backward

    def forward_done(self) -> None:
        """Between the forward and the backward pass of a student: waits for the backward pass before it."""
        if not self._streams or self._pass == 0 or torch.cuda.is_current_stream_capturing():
            return
        stream = self._streams[self.lane]
        self._own_forward = stream.record_event()
        if self._backward is not None:
            stream.wait_event(self._backward)
