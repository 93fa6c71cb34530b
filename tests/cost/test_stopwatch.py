"""Timing: warmed up, long enough, and the median of the samples; on a clock that the test moves."""

from __future__ import annotations

import time

import pytest
import torch

from fastslim.cost import Stopwatch
from fastslim.cost.stopwatch import stopwatch_for
from fastslim.errors import FastslimValueError


class Machine:
    """A clock, and a call that moves it by the next of the given seconds (the last one from then on)."""

    def __init__(self, *seconds: float) -> None:
        self.now, self.seconds, self.calls, self.waits = 0.0, list(seconds), 0, 0

    def run(self) -> None:
        self.calls += 1
        self.now += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]

    def wait(self) -> None:
        self.waits += 1

    def stopwatch(self, **options: float) -> Stopwatch:
        return Stopwatch(clock=lambda: self.now, wait=self.wait, **options)  # type: ignore[arg-type]


def test_warm_up_is_left_out() -> None:
    machine = Machine(100.0, 100.0, 2.0)
    assert machine.stopwatch(min_seconds=1.0, samples=3, warm_up=2).seconds(machine.run) == 2.0


def test_a_disturbed_sample_does_not_count() -> None:
    machine = Machine(1.0, 1.0, 1.0, 50.0, 1.0)
    assert machine.stopwatch(min_seconds=1.0, samples=3, warm_up=1).seconds(machine.run) == 1.0


def test_short_calls_are_repeated_until_the_time_is_filled() -> None:
    machine = Machine(0.001)
    assert machine.stopwatch(min_seconds=1.0, samples=5, warm_up=1).seconds(machine.run) == pytest.approx(0.001)
    assert machine.calls == pytest.approx(1000, abs=10)


def test_the_device_is_waited_for_around_every_sample() -> None:
    machine = Machine(1.0)
    machine.stopwatch(min_seconds=0.1, samples=4, warm_up=1).seconds(machine.run)
    assert machine.waits == 2 * (4 + 1)


def test_one_thread_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert stopwatch_for(torch.device("cpu")).clock is time.thread_time
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert stopwatch_for(torch.device("cpu")).clock is time.perf_counter


@pytest.mark.parametrize("options", [{"samples": 0}, {"warm_up": 0}, {"min_seconds": 0.0}])
def test_impossible_settings_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(FastslimValueError, match="a Stopwatch needs min_seconds above 0 and at least one sample"):
        Stopwatch(**options)  # type: ignore[arg-type]
