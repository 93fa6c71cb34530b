"""Times every op by every backend, each against its reference first: GB/s or TFLOP/s and the share of the ceiling.

python benchmarks/gpu/kernels.py [--dry-run] [--seconds 300] [--only OP] [--record]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import ceilings
import torch
from kernel_cases import cases, small_cases
from kernel_times import COLUMNS, measure, row_of
from record import record
from results import Stage

from fastslim.ops import backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, help="the result file to add to")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, one repetition, on the CPU")
    parser.add_argument("--seconds", type=float, default=300, help="stop after this long; the rest is named")
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--record", action="store_true", help="write fastslim/ops/measured/<architecture>.json")
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry_run else "cuda")
    dtype, repeats = getattr(torch, options.dtype), 1 if options.dry_run else 20
    deadline = time.monotonic() + options.seconds
    torch.backends.cudnn.allow_tf32 = False  # the references are float32

    stage = Stage(options.result, "kernels")
    top = ceilings.measure(device, repeats)
    stage.data("ceilings", top._asdict())
    stage.data("target", backend.target_of(torch.empty(0, device=device)))
    stage.note(f"{ceilings.described(top)}; {options.dtype}, channels_last; floors at 4.3 TB/s and 790 TFLOP/s")
    rows: dict[str, list[list[Any]]] = {}
    timed: list[dict[str, Any]] = []
    failures: list[list[str]] = []
    left = 0
    selected = [case for case in (small_cases() if options.dry_run else cases()) if options.only in case.op]
    for position, case in enumerate(selected):
        if time.monotonic() > deadline:
            left = len(selected) - position
            stage.table(case.op, COLUMNS, rows.get(case.op, []))
            break
        try:
            times, failed, asked = measure(case, device, dtype, repeats)
        except torch.OutOfMemoryError as error:
            failures.append([case.op, case.direction, case.shape, "all", str(error)[:200]])
            continue
        failures += [[case.op, case.direction, case.shape, name, reason[:200]] for name, reason in failed.items()]
        rows.setdefault(case.op, []).extend(row_of(case, name, spread, top) for name, spread in times.items())
        medians = {name: spread.median for name, spread in times.items()}
        named = {"op": case.op, "direction": case.direction, "shape": case.shape}
        timed.append({**named, "times": medians, "asked": [list(question) for question in asked]})
        if position + 1 == len(selected) or selected[position + 1].op != case.op:
            stage.table(case.op, COLUMNS, rows[case.op])
            stage.data("timed", timed)
    stage.data("timed", timed)
    stage.table("not timed", ["op", "direction", "shape", "backend", "why"], _summarised(failures))
    if left:
        stage.note(f"{left} of {len(selected)} cases left out: the stage's time was up")
    if options.record:
        stage.note(f"dispatch table: {record(stage.result.content)}")
    if any("error" in failure[4] or failure[4].startswith("failed") for failure in failures):
        raise SystemExit("a backend failed or was wrong: see 'not timed'")


def _summarised(failures: list[list[str]]) -> list[list[str]]:
    """One line per op, backend and reason."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for op, direction, shape, name, why in failures:
        groups.setdefault((op, name, why), []).append(f"{direction} {shape}")
    return [
        [op, listed[0] if len(listed) == 1 else f"{listed[0]} and {len(listed) - 1} more", "", name, why]
        for (op, name, why), listed in groups.items()
    ]


if __name__ == "__main__":
    main()
