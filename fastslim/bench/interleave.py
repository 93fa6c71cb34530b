"""Times of rivals that take turns in one process, and the ratios of what ran right after one another.

A machine's speed drifts by tens of percent within minutes; two calls in a row see the same machine, so that the median
of their ratios holds still where a ratio of medians does not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Run = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """The ratios of interleaved pairs.

    Attributes:
        median: of all pairs.
        low, high: their quartiles.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Ours over theirs, pair by pair."""
    return Ratio(*quartiles([a / b for a, b in zip(ours, theirs, strict=True)]))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    low, median, high = statistics.quantiles(values, n=4)
    return median, low, high


def seconds(run: Run) -> float:
    """Of one call, by the clock on the wall."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(
    runs: Mapping[str, Run], rounds: int, *, warm_up: int = 2, after_round: Callable[[int], object] = lambda done: None
) -> dict[str, list[float]]:
    """Seconds of every call; in each round all of them run, in the order given.

    Args:
        runs: what to time, by name.
        rounds: how often.
        warm_up: rounds before, which are not timed.
        after_round: called with the number of rounds done, those before included.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(-warm_up, rounds):
        for name, run in runs.items():
            took = seconds(run)
            if index >= 0:
                times[name].append(took)
        after_round(index + warm_up + 1)
    return times


def quickest(runs: Sequence[Run], rounds: int = 3) -> int:
    """The place of the run with the smallest median."""
    times = interleaved({str(index): run for index, run in enumerate(runs)}, rounds, warm_up=1)
    return min(range(len(runs)), key=lambda index: statistics.median(times[str(index)]))
