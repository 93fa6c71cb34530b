"""Times every op by every backend, each against its reference first: GB/s or TFLOP/s and the share of the ceiling.

python benchmarks/gpu/kernels.py [--dry-run] [--seconds 300] [--op OP] [--record]

A kernel that leaves the GPU unusable ends the process with exit status 70; the next run leaves that backend out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import ceilings
import torch
from arithmetic import Ceilings
from kernel_cases import cases, small_cases
from kernel_times import COLUMNS, CrashedError, measure, row_of
from record import record
from results import Stage

from fastslim.ops import backend

CRASHED = 70
Failure = tuple[str, str, str]  # call, backend, why


class OpStage:
    """What is known of one op, written to the result file.

    Args:
        stage: of the result file.
        op: its name.
        top: the measured ceilings.
    """

    def __init__(self, stage: Stage, op: str, top: Ceilings) -> None:
        self.stage, self.op, self.top = stage, op, top
        self.rows: list[list[Any]] = []
        self.failures: list[Failure] = []
        self.timed = [entry for entry in stage.content.get("data", {}).get("timed", []) if entry["op"] != op]
        self.crashed = dict(c[1:] for c in stage.content.get("data", {}).get("crashed", []) if c[0] == op)
        self.failures += [("crashed the GPU", name, why) for name, why in self.crashed.items()]

    def measure(self, listed: list[Any], device: torch.device, dtype: torch.dtype, repeats: int, end: float) -> None:
        """Measures the op's cases until a time."""
        for position, case in enumerate(listed):
            if time.monotonic() > end:
                self.stage.note(f"{self.op}: {len(listed) - position} of {len(listed)} cases left out, time was up")
                break
            call = f"{case.direction} {case.shape}"
            try:
                times, failed, asked = measure(case, device, dtype, repeats, self.crashed)
            except torch.OutOfMemoryError as error:
                self.failures.append((call, "all", str(error)[:200]))
                continue
            except CrashedError as crash:
                crashes = self.stage.content.get("data", {}).get("crashed", [])
                self.stage.data("crashed", [*crashes, [self.op, crash.backend, f"{call}: {crash}"]])
                raise SystemExit(CRASHED) from crash
            self.failures += [(call, name, reason[:200]) for name, reason in failed.items()]
            self.rows += [row_of(case, name, spread, self.top) for name, spread in times.items()]
            medians = {name: spread.median for name, spread in times.items()}
            named = {"op": case.op, "direction": case.direction, "shape": case.shape}
            self.timed.append({**named, "times": medians, "asked": [list(question) for question in asked]})
        self.write()

    def write(self) -> None:
        """Adds to the result file."""
        self.stage.table(self.op, COLUMNS, self.rows)
        self.stage.data("timed", self.timed)
        groups: dict[tuple[str, str], list[str]] = {}
        for call, name, why in self.failures:
            groups.setdefault((name, why), []).append(call)
        lines = [
            [calls[0] if len(calls) == 1 else f"{calls[0]} and {len(calls) - 1} more", name, why]
            for (name, why), calls in groups.items()
        ]
        if lines:
            self.stage.table(f"{self.op}: not timed", ["call", "backend", "why"], lines)

    @property
    def wrong(self) -> bool:
        """Whether a backend failed or computed something else."""
        return bool(self.crashed) or any("error" in why or why.startswith("failed") for _, _, why in self.failures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, help="the result file to add to")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, one repetition, on the CPU")
    parser.add_argument("--seconds", type=float, default=300, help="stop after this long; the rest is named")
    parser.add_argument("--op", help="only this one")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--record", action="store_true", help="write fastslim/ops/measured/<architecture>.json")
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry_run else "cuda")
    dtype, repeats = getattr(torch, options.dtype), 1 if options.dry_run else 20
    end = time.monotonic() + options.seconds
    torch.backends.cudnn.allow_tf32 = False  # the references are float32

    stage = Stage(options.result, "kernels")
    known = stage.content.get("data", {}).get("ceilings")
    top = Ceilings(**known) if known else ceilings.measure(device, repeats)
    if not known:
        stage.data("ceilings", top._asdict())
        stage.data("target", backend.target_of(torch.empty(0, device=device)))
        stage.note(f"{ceilings.described(top)}; {options.dtype}, channels_last; floors at 4.3 TB/s and 790 TFLOP/s")
    listed = list(small_cases() if options.dry_run else cases())
    wrong = []
    for op in dict.fromkeys(case.op for case in listed if options.op in (None, case.op)):
        measured = OpStage(stage, op, top)
        measured.measure([case for case in listed if case.op == op], device, dtype, repeats, end)
        if measured.wrong:
            wrong.append(op)
    if options.record:
        stage.note(f"dispatch table: {record(stage.result.content)}")
    if wrong:
        raise SystemExit(f"a backend failed or was wrong: see what was not timed of {', '.join(wrong)}")


if __name__ == "__main__":
    main()
