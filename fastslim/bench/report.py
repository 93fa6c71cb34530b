"""`measure_step`: a sandwich step of a network against its plain step, in numbers and as a table."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastslim.algorithms import verify
from fastslim.bench.interleave import Ratio, interleaved, ratio_of
from fastslim.bench.memory import peak_of_training
from fastslim.bench.sides import FORMATS, Task, in_faster_format, plain_side, sandwich_side
from fastslim.errors import FastslimRuntimeError

Show = Callable[[float, str], None]
VERIFIED_SAMPLES = 4
WARM_UP = 2
MIB = 2**20


@dataclass(frozen=True)
class StepReport:
    """What a sandwich step costs.

    Attributes:
        step: its time over the plain step's, in the memory format that is faster for each.
        plain: the same over the plain step in every memory format.
        milliseconds: median of the sandwich step and of each plain step.
        formats: the memory format that is faster, of both steps.
        multiply_adds: of the passes over the plain step's, median of the steps.
        peak_mib: most memory of tensors at one time.
        pairs: how often the steps took turns.
        verified: the table of `fastslim.verify`.
        plan: who computes what, and what is shared or fused.
    """

    step: Ratio
    plain: dict[str, Ratio]
    milliseconds: dict[str, float]
    formats: dict[str, str]
    multiply_adds: float
    peak_mib: dict[str, float]
    pairs: int
    verified: str
    plan: list[str]

    @property
    def peak_memory(self) -> float:
        """Of the sandwich step over the plain step's."""
        return self.peak_mib["sandwich step"] / self.peak_mib["plain step"]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return {**dataclasses.asdict(self), "peak_memory": self.peak_memory}

    def __str__(self) -> str:
        ratios = [
            ("sandwich step / plain step", "median", "quartiles"),
            ("time", f"{self.step.median:.2f}", f"{self.step.low:.2f} to {self.step.high:.2f}"),
            ("multiply-adds", f"{self.multiply_adds:.2f}", ""),
            ("peak memory", f"{self.peak_memory:.2f}", ""),
        ]
        steps = [("step", "ms", "memory format")]
        steps += [("sandwich", f"{self.milliseconds['sandwich step']:.1f}", self.formats["sandwich step"])]
        counts = {self.formats["plain step"]: ", counts"}
        steps += [("plain", f"{self.milliseconds[name]:.1f}", name + counts.get(name, "")) for name in self.plain]
        memory = ", ".join(f"{name} {value:.0f} MiB" for name, value in self.peak_mib.items())
        pieces = [aligned(ratios), aligned(steps), f"{self.pairs} interleaved pairs; peak of tensors: {memory}"]
        return "\n\n".join([*pieces, "\n".join(["who computes what:", *(f"  {line}" for line in self.plan)])])


def aligned(rows: list[tuple[str, str, str]]) -> str:
    """A table of a name, a number and a remark."""
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{name:{wide[0]}}  {number:>{wide[1]}}  {remark}".rstrip() for name, number, remark in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def measure_step(task: Task, pairs: int, show: Show = lambda done, what: None) -> StepReport:
    """Verifies the sandwich step, then measures it against the plain one.

    Args:
        task: network, data and precision.
        pairs: how often the two take turns.
        show: called with the part that is done and with what is being done.

    Raises:
        FastslimRuntimeError: the sandwich step is not exact; a wrong step has no speed.
    """
    show(0.0, "verifying")
    with task.precision():
        verified = verify(task.algo, task.part(VERIFIED_SAMPLES))
    if not verified:
        raise FastslimRuntimeError(f"no speed is reported of a step that is not exact:\n{verified}")
    show(0.05, "choosing memory formats")
    plain = {name: plain_side(task, memory_format) for name, memory_format in FORMATS.items()}
    ours, our_format = in_faster_format(partial(sandwich_side, task))
    runs = {"sandwich step": ours.step, **{name: side.step for name, side in plain.items()}}
    times = interleaved(
        runs, pairs, warm_up=WARM_UP, after_round=lambda done: show(0.1 + 0.8 * done / (pairs + WARM_UP), "measuring")
    )
    milliseconds = {name: 1e3 * statistics.median(taken) for name, taken in times.items()}
    plain_format = min(plain, key=milliseconds.__getitem__)
    ratios = {name: ratio_of(times["sandwich step"], times[name]) for name in plain}
    formats = {"sandwich step": our_format, "plain step": plain_format}
    multiply_adds = statistics.median(task.draws.multiply_adds())
    del ours, plain, runs
    show(0.9, "measuring memory")
    peaks = {
        name: peak_of_training(partial(make, task, FORMATS[formats[name]])) / MIB
        for name, make in (("sandwich step", sandwich_side), ("plain step", plain_side))
    }
    show(1.0, "done")
    return StepReport(
        ratios[plain_format], ratios, milliseconds, formats, multiply_adds, peaks, pairs, str(verified),
        list(task.algo.plan_report),
    )  # fmt: skip
