"""How long a call takes: warmed up, repeated, the median of several samples."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fastslim.errors import FastslimValueError


def nothing() -> None:
    """What there is to wait for on a CPU."""


class Stopwatch:
    """Times calls.

    Args:
        min_seconds: a measurement takes at least this long, so that short calls are repeated often enough for the
            clock and for what the machine does besides.
        samples: pieces of a measurement; their median counts.
        warm_up: calls before, which choose algorithms and fill caches.
        clock: seconds now.
        wait: returns when the device has nothing left to do.

    Raises:
        FastslimValueError: no samples, or a time that is not above 0.
    """

    def __init__(
        self,
        min_seconds: float = 0.01,
        samples: int = 5,
        warm_up: int = 2,
        clock: Callable[[], float] = time.perf_counter,
        wait: Callable[[], Any] = nothing,
    ) -> None:
        if samples < 1 or warm_up < 1 or not min_seconds > 0:
            raise FastslimValueError(
                f"a Stopwatch needs min_seconds above 0 and at least one sample and one call of warm_up, got "
                f"min_seconds={min_seconds}, samples={samples}, warm_up={warm_up}"
            )
        self.min_seconds, self.samples, self.warm_up = min_seconds, samples, warm_up
        self.clock, self.wait = clock, wait

    @property
    def name(self) -> str:
        """What the clock is called: times of different clocks are not comparable."""
        return getattr(self.clock, "__name__", type(self.clock).__name__)

    def seconds(self, run: Callable[[], Any]) -> float:
        """Seconds of one call of `run`: the median over the samples of the mean within each."""
        for _ in range(self.warm_up):
            run()
        once = self._sample(run, 1)
        repeats = max(1, int(self.min_seconds / self.samples / once)) if once > 0 else 1000
        return statistics.median(self._sample(run, repeats) for _ in range(self.samples))

    def _sample(self, run: Callable[[], Any], repeats: int) -> float:
        self.wait()
        start = self.clock()
        for _ in range(repeats):
            run()
        self.wait()
        return (self.clock() - start) / repeats


def stopwatch_for(device: torch.device) -> Stopwatch:
    """The usual stopwatch of a device.

    One CPU thread is timed by its own CPU time, which other programs cannot stretch: on a machine with more runnable
    processes than cores a ResNet-18 took 79 to 150 ms by the clock on the wall, and 39 to 48 ms by its own.
    """
    if device.type == "cuda":
        return Stopwatch(wait=lambda: torch.cuda.synchronize(device))
    return Stopwatch(clock=time.thread_time if torch.get_num_threads() == 1 else time.perf_counter)
