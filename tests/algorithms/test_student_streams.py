"""Students on two streams: on stand-ins for CUDA's streams, the order of what must not run at the same time."""

from __future__ import annotations

import contextlib

import pytest
import torch
from test_sandwich_step import algorithm, assert_equal, train

from fastslim.algorithms import sandwich_step
from fastslim.algorithms.student_streams import StudentStreams


class Stream:
    """Knows what has certainly happened when its next work starts: a set of finished pieces of work."""

    current: Stream

    def __init__(self, device=None):
        self.device, self.done = torch.device("cuda"), set()

    def work(self, name):
        self.done = self.done | {name}
        return self.done

    def record_event(self):
        return frozenset(self.done)

    def wait_event(self, event):
        self.done = self.done | event

    def wait_stream(self, other):
        self.done = self.done | other.done


@pytest.fixture
def cuda(monkeypatch):
    """The stream that was current before, under stand-ins for torch's functions on streams."""
    main = Stream()
    current = [main]

    @contextlib.contextmanager
    def switch(stream):
        current.append(stream)
        try:
            yield
        finally:
            current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", switch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return current


def passes(streams, cuda, students, replayed=()):
    """What every piece of work may rely on, by name."""
    known = {}
    cuda[-1].work("batch")
    with streams.step():
        for index in range(students + 1):
            with streams.of_pass(index):
                known[f"forward{index}"] = cuda[-1].done
                cuda[-1].work(f"forward{index}")
                if index not in replayed:
                    streams.forward_done()
                known[f"backward{index}"] = cuda[-1].done
                cuda[-1].work(f"backward{index}")
    known["after"] = cuda[-1].done
    return known


@pytest.mark.parametrize("replayed", [(), (1,)], ids=["eager", "min_pass_replayed"])
def test_what_shares_memory_is_ordered_and_the_rest_overlaps(cuda, replayed):
    known = passes(StudentStreams(torch.device("cuda")), cuda, students=4, replayed=replayed)
    for index in range(1, 5):
        assert {"batch", "forward0", "backward0", f"forward{index - 1}"} <= known[f"forward{index}"]
        if index > 1 and index not in replayed:
            assert f"backward{index - 1}" in known[f"backward{index}"]
    # Two of a stream follow one another; neighbours overlap.
    assert {"forward1", "backward1"} <= known["forward3"]
    assert "backward2" not in known["forward3"]
    assert ("backward1" in known["forward2"]) == (1 in replayed)
    assert {f"backward{index}" for index in range(5)} <= known["after"]


def test_the_current_stream_waits_when_a_pass_fails(cuda):
    streams = StudentStreams(torch.device("cuda"))

    def failing_step():
        with streams.step(), streams.of_pass(1):
            cuda[-1].work("forward1")
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        failing_step()
    assert "forward1" in cuda[0].done


def test_a_step_goes_through_the_streams(cuda, monkeypatch):
    expected = train(algorithm("mixed"))
    lanes = []

    class Watched(StudentStreams):
        def __init__(self, device):
            super().__init__(device and torch.device("cuda"))

        def forward_done(self):
            lanes.append(self.lane)
            super().forward_done()

    monkeypatch.setattr(sandwich_step, "StudentStreams", Watched)
    assert_equal(train(algorithm("mixed", overlap_students=True)), expected)
    assert lanes == [0, 1, 0, 1] * 2
