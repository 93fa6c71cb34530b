"""How every GPU benchmark measures time: device events, rivals interleaved, inputs that no cache can hold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

L2 = 60 << 20
CYCLES_PER_SECOND = 2e9
#: The driver queues about a thousand launches; the host must not wait for a place while the clock runs.
CALLS = 8


class Spread(NamedTuple):
    """Microseconds: median and quartiles of `count` repetitions."""

    median: float
    low: float
    high: float
    count: int


def spread(samples: list[float]) -> Spread:
    """Median and quartiles; of one sample, itself."""
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0], 1)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, low, high, len(samples))


def input_sets(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of inputs to rotate so that each is out of the L2 cache when its turn comes."""
    return 1 if device.type == "cpu" else min(64, 1 + -(-2 * L2 // max(bytes_of_one, 1)))


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    runs: Mapping[str, Callable[[int], object]], device: torch.device, repeats: int = 20, calls: int = CALLS
) -> dict[str, Spread]:
    """Microseconds of one call of each run, all runs taking turns.

    Args:
        runs: functions of the call's number, which picks the set of inputs.
        device: where they compute.
        repeats: turns of each.
        calls: in one turn.
    """
    if device.type == "cpu":
        calls = 1
    warm = {name: _warm_up(run, device, calls) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats):
        for name, run in runs.items():
            samples[name].append(_microseconds(run, device, calls, warm[name], turn * calls))
    return {name: spread(times) for name, times in samples.items()}


def _warm_up(run: Callable[[int], object], device: torch.device, calls: int) -> float:
    """Seconds the host needs to issue one turn."""
    seconds = 0.0
    for _ in range(2 if device.type == "cuda" else 1):
        synchronize(device)
        start = time.perf_counter()
        for call in range(calls):
            run(call)
        seconds = time.perf_counter() - start
    synchronize(device)
    return seconds


def _microseconds(
    run: Callable[[int], object], device: torch.device, calls: int, issue_seconds: float, first: int
) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        for call in range(first, first + calls):
            run(call)
        return (time.perf_counter() - start) / calls * 1e6
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    # The device sleeps until all launches are queued; then it runs them without waiting for the host.
    torch.cuda._sleep(int(min(1.5 * issue_seconds + 50e-6, 0.2) * CYCLES_PER_SECOND))
    begin.record()
    for call in range(first, first + calls):
        run(call)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls * 1e3
