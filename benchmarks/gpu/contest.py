"""Contenders for the whole step, measured by turns: time, host time, device time, launches, syncs and memory."""

from __future__ import annotations

import contextlib
import gc
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import timing
import torch
from rivals import Step

PAIRS = 20
TURN = 2  # steps in a row
WARM_UP = 5  # AutoSlim captures its graphs in the fourth step
COLUMNS = [
    "side", "ms", "quartiles", "x plain", "ours is faster by", "host ms", "device ms", "kernels", "launches",
    "syncs", "peak MiB", "first steps ms",
]  # fmt: skip


class Side(NamedTuple):
    """One contender, warmed up.

    Attributes:
        step: makes one step.
        first: milliseconds of the first steps.
        peak: bytes of device memory it takes, its network and optimizer included.
        losses: of the first step.
    """

    step: Step
    first: list[float]
    peak: int
    losses: list[float]


class OutOfTimeError(Exception):
    """A contender took longer than it may."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Ends the block with :class:`OutOfTimeError`; a compiler would go on for minutes."""

    def ring(*_: Any) -> None:
        raise OutOfTimeError(f"not ready after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    # Again and again: one that rings while garbage is collected is swallowed.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ready(make: Callable[[], Step], device: torch.device, steps: int) -> Side:
    """Builds a contender and makes its first steps."""
    gc.collect()
    memory = torch.cuda if device.type == "cuda" else None
    if memory:
        memory.empty_cache()
        memory.reset_peak_memory_stats()
    before = memory.memory_allocated() if memory else 0
    torch.manual_seed(1)
    step, first, losses = make(), [], []
    for index in range(steps):
        start = time.perf_counter()
        values = step()
        timing.synchronize(device)
        first.append((time.perf_counter() - start) * 1e3)
        if index == 0:
            losses = [float(value) for value in values]
    return Side(step, first, memory.max_memory_allocated() - before if memory else 0, losses)


def turn(step: Step, device: torch.device) -> tuple[float, float]:
    """Milliseconds of a step, and of the host issuing it, over a few steps in a row."""
    timing.synchronize(device)
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
    start = time.perf_counter()
    for _ in range(TURN):
        step()
    issued = time.perf_counter() - start
    if device.type != "cuda":
        return issued / TURN * 1e3, issued / TURN * 1e3
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / TURN, issued / TURN * 1e3


class Profile(NamedTuple):
    """What a profiler counts in one step.

    Attributes:
        busy: milliseconds of all kernels and copies.
        kernels: how many there are.
        launches: how often the host asked for one, or for a graph of them.
    """

    busy: float | None
    kernels: int | None
    launches: int | None


def profile_of(step: Step, device: torch.device) -> Profile:
    """Profiles one step."""
    if device.type != "cuda":
        return Profile(None, None, None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    gpu = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    calls = re.compile(r"cu(da)?(Graph)?Launch|cuda(Memcpy|Memset)Async")
    launches = sum(bool(calls.match(event.name)) for event in profile.events())
    return Profile(sum(event.time_range.elapsed_us() for event in gpu) / 1e3, len(gpu), launches or None)


def syncs_of(step: Step, device: torch.device) -> int | None:
    """How often the host waits for the device in a step."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def compare(
    contenders: dict[str, Callable[[], Step]], device: torch.device, seconds: float, caps: dict[str, float]
) -> tuple[list[list[Any]], dict[str, Any], list[str]]:
    """Table rows, numbers for the file, and what has failed.

    Args:
        contenders: by name; "ours" and "plain" come first.
        device: where they compute.
        seconds: for the interleaved steps.
        caps: seconds until a contender must be ready, where there is a limit.
    """
    dry = device.type == "cpu"
    sides: dict[str, Side] = {}
    problems = []
    for name, make in contenders.items():
        try:
            with at_most(caps[name]) if name in caps else contextlib.nullcontext():
                sides[name] = ready(make, device, 1 if dry else WARM_UP)
        except Exception as error:  # a rival that cannot compute the step is a result
            problems.append(f"{name} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    if "ours" not in sides:
        raise RuntimeError("; ".join(problems))
    for name, side in sides.items():
        if name != "plain" and not agrees(side.losses, sides["ours"].losses):
            problems.append(f"{name} computes other losses: {side.losses} against {sides['ours'].losses}")
    times: dict[str, list[float]] = {name: [] for name in sides}
    host: dict[str, list[float]] = {name: [] for name in sides}
    deadline = time.monotonic() + seconds
    while len(times["ours"]) < (1 if dry else PAIRS):
        if len(times["ours"]) >= 3 and time.monotonic() > deadline:
            break
        for name, side in sides.items():
            whole, issued = turn(side.step, device)
            times[name].append(whole)
            host[name].append(issued)
    rows, numbers = [], {}
    for name, side in sides.items():
        spread = timing.spread(times[name])
        profile = profile_of(side.step, device)
        numbers[name] = {
            "ms": spread._asdict(), "ratio to plain": _ratio(times[name], times.get("plain")),
            "ratio to ours": _ratio(times[name], times["ours"]), "host ms": timing.spread(host[name]).median,
            "device ms": profile.busy, "kernels": profile.kernels, "launches": profile.launches,
            "syncs": syncs_of(side.step, device),
            "peak MiB": side.peak / 2**20, "first ms": side.first, "samples ms": times[name],
        }  # fmt: skip
        values = numbers[name]
        rows.append([
            name, spread.median, f"{spread.low:.4g}-{spread.high:.4g}", values["ratio to plain"],
            values["ratio to ours"], values["host ms"], *profile, values["syncs"], values["peak MiB"],
            ", ".join(f"{ms:.0f}" for ms in side.first),
        ])  # fmt: skip
    return rows, numbers, problems


def _ratio(times: list[float], reference: list[float] | None) -> float | None:
    """Median of paired ratios."""
    if not reference:
        return None
    return timing.spread([a / b for a, b in zip(times, reference, strict=True)]).median


def agrees(losses: list[float], expected: list[float]) -> bool:
    """Whether two sides compute the same step, as far as low precision allows to say."""
    return len(losses) == len(expected) and all(
        abs(a - b) <= 0.05 * abs(b) + 0.02 for a, b in zip(losses, expected, strict=True)
    )
