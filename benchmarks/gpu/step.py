"""The whole sandwich step against its rivals: time, host time, device time, launches, syncs and memory.

python benchmarks/gpu/step.py [--dry-run] [--seconds 500] [--only NETWORK] [--batches 64,128,256]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import rivals
import timing
import torch
from results import Stage
from rivals import Step, Workload

import fastslim

PAIRS = 20
TURN = 2  # steps in a row
WARM_UP = 3
COLUMNS = [
    "side", "ms", "quartiles", "x plain", "ours is faster by", "host ms", "device ms", "launches", "syncs", "peak MiB",
    "first steps ms",
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
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
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


def kernels_of(step: Step, device: torch.device) -> tuple[float | None, int | None]:
    """Milliseconds of all kernels and copies of a step, and how many there are."""
    if device.type != "cuda":
        return None, None
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        step()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.time_range.elapsed_us() for event in events) / 1e3, len(events)


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
    for name, side in sides.items():
        if name not in ("ours", "plain") and not agrees(side.losses, sides["ours"].losses):
            problems.append(f"{name} computes other losses: {side.losses} against {sides['ours'].losses}")
    times: dict[str, list[float]] = {name: [] for name in sides}
    host: dict[str, list[float]] = {name: [] for name in sides}
    deadline = time.monotonic() + seconds
    while sides and len(times["ours"]) < (1 if dry else PAIRS):
        if len(times["ours"]) >= 3 and time.monotonic() > deadline:
            break
        for name, side in sides.items():
            whole, issued = turn(side.step, device)
            times[name].append(whole)
            host[name].append(issued)
    rows, numbers = [], {}
    for name, side in sides.items():
        spread = timing.spread(times[name])
        busy, launches = kernels_of(side.step, device)
        numbers[name] = {
            "ms": spread._asdict(), "ratio to plain": _ratio(times[name], times.get("plain")),
            "ratio to ours": _ratio(times[name], times["ours"]), "host ms": timing.spread(host[name]).median,
            "device ms": busy, "launches": launches, "syncs": syncs_of(side.step, device),
            "peak MiB": side.peak / 2**20, "first ms": side.first, "samples ms": times[name],
        }  # fmt: skip
        values = numbers[name]
        rows.append([
            name, spread.median, f"{spread.low:.4g}-{spread.high:.4g}", values["ratio to plain"],
            values["ratio to ours"], values["host ms"], busy, launches, values["syncs"], values["peak MiB"],
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


def contenders(load: Workload, algo: fastslim.AutoSlim, randoms: list[Any]) -> dict[str, Callable[[], Step]]:
    """All sides but the compiled one."""
    return {
        "ours": partial(rivals.ours, load, algo, randoms),
        "plain": partial(rivals.plain, load),
        "slices": partial(rivals.slices, load),
        "masks": partial(rivals.slices, load, rivals.Masks),
    }


def check(load: Workload, algo: fastslim.AutoSlim) -> str | None:
    """What :func:`fastslim.verify` objects to, or None."""
    images, labels = load.batches[0]
    with load.autocast():
        report = fastslim.verify(copy.deepcopy(algo), (images[:8, :, :64, :64], labels[:8]))
    return None if report else str(report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, help="the result file to add to")
    parser.add_argument("--dry-run", action="store_true", help="narrow networks, small images, on the CPU")
    parser.add_argument("--seconds", type=float, default=500, help="for everything")
    parser.add_argument("--only", default="", help="the network")
    parser.add_argument("--batches", default="64,128,256")
    options = parser.parse_args()
    dry = options.dry_run
    device, dtype = torch.device("cpu" if dry else "cuda"), torch.bfloat16
    names = [name for name in rivals.FORWARDS if options.only in name]
    batches = [8] if dry else [int(batch) for batch in options.batches.split(",")]
    stage = Stage(options.result, "step")
    stage.note("bf16 autocast, channels_last, cudnn.benchmark off; SGD; a step is max + min + 2 random subnets")
    if dry:
        stage.note("torch.compile is not rehearsed: it takes minutes on a CPU")
    start, wrong = time.monotonic(), []
    cells = [(name, batch) for batch in batches for name in names]
    for index, (name, batch) in enumerate(cells):
        remaining = options.seconds - (time.monotonic() - start)
        share = remaining / (len(cells) - index)
        if remaining < 10 and not dry:
            stage.note(f"left out, the stage's time was up: {name} at N = {batch}")
            continue
        try:
            load, algo, randoms = rivals.prepare(
                name, batch, 64 if dry else 224, device, dtype, 0.25 if dry else 1.0, 4 if dry else 8
            )
            if index < len(names) and (problem := check(load, algo)):
                wrong.append(name)
                stage.note(f"{name}: no speed of a wrong step\n{problem}")
            if name in wrong:
                continue
            sides, caps = contenders(load, algo, randoms), {}
            if index < len(names) and not dry:  # compiling takes as long as everything else together
                sides["compiled"] = partial(rivals.compiled, load)
                caps["compiled"] = 0.3 * options.seconds
            rows, numbers, problems = compare(sides, device, 0.3 * share, caps)
        except Exception as error:  # one cell's failure leaves the others
            wrong.append(name)
            stage.note(f"{name} at N = {batch} failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
            continue
        finally:
            load = algo = sides = None
            torch._dynamo.reset()
        stage.table(f"{name}, N = {batch}", COLUMNS, rows)
        stage.data(f"{name}, N = {batch}", numbers)
        for problem in problems:
            stage.note(f"{name}, N = {batch}: {problem}")
    if wrong:
        raise SystemExit(f"failed: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
