"""The first questions to a GPU, most urgent first: what the libraries do there, and whether our plan holds.

python benchmarks/gpu/first.py [--dry-run]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import ceilings
import rivals
import shapes
import timing
import torch
import torch.nn.functional as F
from arithmetic import Ceilings
from contest import COLUMNS as STEP_COLUMNS
from contest import compare
from kernel_cases import depthwise_conv2d_cases, network_pack_cases, prefix_pack_cases
from kernel_times import COLUMNS, measure, row_of
from prepared import Case
from results import Stage
from step import contenders


class Asked:
    """What every question needs.

    Args:
        stage: takes the answers.
        dry: tiny shapes on the CPU.
    """

    def __init__(self, stage: Stage, dry: bool) -> None:
        self.stage, self.dry = stage, dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.repeats = 1 if dry else 20
        known = stage.content.get("data", {}).get("ceilings")
        self.top = Ceilings(**known) if known else ceilings.measure(self.device, self.repeats)
        if not known:
            stage.data("ceilings", self.top._asdict())
            stage.note(ceilings.described(self.top))


def depthwise(asked: Asked) -> None:
    """Depthwise convolution in bf16: the library's way, plain torch, and our kernels."""
    if asked.dry:
        listed = depthwise_conv2d_cases(2, (shapes.Depthwise(16, 1, 8),))
    else:
        listed = depthwise_conv2d_cases(shapes.BATCH, shapes.MOBILENET_DEPTHWISE)
    by_backend(asked, "depthwise_conv2d in bf16, channels_last", listed)


def packing(asked: Asked) -> None:
    """All weights of a network cast, all gradients added, in one launch."""
    listed = prefix_pack_cases({"small": [(16, 3, 3, 3), (10, 24)]}) if asked.dry else network_pack_cases()
    by_backend(asked, "prefix_pack and prefix_unpack_add", listed)


def by_backend(asked: Asked, title: str, cases: Iterable[Case]) -> None:
    """Cases of the kernel benchmark."""
    rows = []
    for case in cases:
        times, failed, _ = measure(case, asked.device, torch.bfloat16, asked.repeats)
        rows += [row_of(case, name, spread, asked.top) for name, spread in times.items()]
        for name, reason in failed.items():
            asked.stage.data(f"{case.op} {case.direction} {case.shape} {name}", reason)
    asked.stage.table(title, COLUMNS, rows)


def norm_backend(asked: Asked) -> None:
    """Which implementation of batch normalisation torch takes, and which kernels that runs."""
    rows = []
    shape = (2, 8, 4, 4) if asked.dry else (64, 256, 56, 56)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(shape, device=asked.device).to(dtype).contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        vectors = [torch.rand(shape[1], device=asked.device) for _ in range(4)]
        mean, var, weight, bias = vectors
        chosen = torch._C._select_batch_norm_backend(x, weight, bias, mean, var, True, 1e-5)

        def run(x=x, mean=mean, var=var, weight=weight, bias=bias) -> None:
            y = F.batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-5)
            torch.autograd.grad(y, x, x.detach())

        rows.append(
            [str(dtype).removeprefix("torch."), str(chosen).rsplit(".", 1)[-1], ", ".join(names_of(run, asked))]
        )
    asked.stage.table("batch normalisation in channels_last", ["dtype", "backend", "kernels"], rows)


def names_of(run: Callable[[], object], asked: Asked) -> list[str]:
    """Names of the kernels that a call runs, shortened."""
    run()
    if asked.device.type != "cuda":
        return ["no GPU"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    names = [event.name.replace("(anonymous namespace)::", "").removeprefix("void ") for event in events]
    return list(dict.fromkeys(name.split("<")[0].split("(")[0] for name in names))


def baselines(asked: Asked) -> None:
    """ResNet-50 at N = 64: our step, a plain step, clean slices, boolean masks."""
    dry = asked.dry
    load, algo, randoms = rivals.prepare(
        "resnet50", 4 if dry else 64, 32 if dry else 224, asked.device, torch.bfloat16, 0.25 if dry else 1.0, 4
    )
    rows, numbers, problems = compare(contenders(load, algo, randoms), asked.device, 25, {})
    asked.stage.table("ResNet-50, N = 64: not verified here, see stage step", STEP_COLUMNS, rows)
    asked.stage.data("baselines", numbers)
    for problem in problems:
        asked.stage.note(problem)


def addmm_into_float32(asked: Asked) -> None:
    """bf16 matrices, a float32 result added to a strided view: does it run, is it right, what does it cost?"""
    rows, columns, depth = (16, 8, 64) if asked.dry else (256, 192, 200_704)
    a, b = (torch.randn(depth, width, device=asked.device).to(torch.bfloat16) for width in (rows, columns))
    full = torch.randn(rows + 16, columns + 64, device=asked.device)
    view = full[:rows, :columns]
    before = full.clone()
    truth = before[:rows, :columns].double() + a.double().t() @ b.double()

    def product_then_add() -> None:
        view.add_(torch.mm(a.t(), b))

    def float32_then_add() -> None:
        view.add_(torch.mm(a.t(), b, out_dtype=torch.float32))

    def into_view() -> None:
        torch.ops.aten.addmm.dtype_out(view, a.t(), b, torch.float32, out=view)

    table, runs = [], {}
    ways = {"mm + add_": product_then_add, "mm(out_dtype) + add_": float32_then_add, "addmm.dtype_out": into_view}
    for name, way in ways.items():
        full.copy_(before)
        try:
            way()
        except (RuntimeError, AttributeError, TypeError) as error:
            table.append([name, f"does not run: {' '.join(str(error).split())[:160]}", "", ""])
            continue
        error = float((view.double() - truth).norm() / truth.norm())
        outside = full.clone()
        outside[:rows, :columns] = before[:rows, :columns]
        table.append([name, "runs", f"{error:.1e}", "yes" if torch.equal(outside, before) else "NO"])
        runs[name] = lambda call, way=way: way()
    times = timing.interleaved(runs, asked.device, asked.repeats)
    for line in table:
        line.append(times[line[0]].median if line[0] in times else None)
    title = f"bf16 product ({rows} x {depth} x {columns}) added to a strided float32 view"
    asked.stage.table(title, ["way", "result", "error", "rest untouched", "us"], table)


QUESTIONS = {
    question.__name__: question for question in (depthwise, norm_backend, baselines, addmm_into_float32, packing)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, help="the result file to add to")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--question", choices=QUESTIONS, help="only this one")
    options = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    stage = Stage(options.result, "first")
    asked = Asked(stage, options.dry_run)
    failed = []
    for question in [QUESTIONS[name] for name in QUESTIONS if options.question in (None, name)]:
        start = time.perf_counter()
        try:
            question(asked)
        except Exception as error:  # the next question can still be answered
            failed.append(question.__name__)
            stage.note(f"{question.__name__} failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
        stage.data(f"{question.__name__} seconds", round(time.perf_counter() - start, 1))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
