"""What a random subnet more costs: steps of max + min + n random subnets, in plain steps, against their multiply-adds.

``python benchmarks/bench_subnets.py`` measures n = 0, 1, 2, 4, 8 in turns with the plain step, on fresh random widths,
fits a line to time and multiply-adds over n, and writes ``benchmarks/results/subnets_cpu.json`` and
``docs/images/subnets.png``. Where a step is bound by arithmetic, the two lines have the same slope.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from step_task import make_task

from conftest import machine
from fastslim.bench import FORMATS, Task, in_faster_format, interleaved, plain_side, quartiles, sandwich_side
from fastslim.engine.plot import ALONE, INK, MUTED, SUPERNET, new_figure, save_figure, set_titles
from fastslim.files import write_atomically

RANDOM_SUBNETS = (0, 1, 2, 4, 8)
CASES = {"ResNet-18": ("resnet18", "fp32", 16, 112), "MobileNetV2": ("mobilenet_v2", "fp32", 16, 112)}
RESULT = Path(__file__).with_name("results") / "subnets_cpu.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "subnets.png"


def slope(values: Sequence[float]) -> float:
    """Of the line with the smallest squared error through the values at RANDOM_SUBNETS."""
    return statistics.linear_regression(RANDOM_SUBNETS, values).slope


def with_random_subnets(task: Task, count: int) -> Task:
    """The same task with another number of random subnets a step."""
    algo = copy.deepcopy(task.algo)
    algo.num_samples = count
    return Task(task.network, algo, task.inputs, task.targets, task.dtype)


def measure(name: str, pairs: int) -> dict[str, Any]:
    """Times and multiply-adds of all steps of a case, in plain steps, and the slopes of both."""
    task = make_task(*CASES[name])
    plain, plain_format = in_faster_format(lambda memory_format: plain_side(task, memory_format))
    ours, our_format = in_faster_format(lambda memory_format: sandwich_side(task, memory_format))
    del ours
    tasks = {str(count): with_random_subnets(task, count) for count in RANDOM_SUBNETS}
    sides = {count: sandwich_side(own, FORMATS[our_format]) for count, own in tasks.items()}
    times = interleaved({"plain": plain.step, **{count: side.step for count, side in sides.items()}}, pairs)
    ratios = {count: [a / b for a, b in zip(times[count], times["plain"], strict=True)] for count in tasks}
    multiply_adds = {count: statistics.median(own.draws.multiply_adds()) for count, own in tasks.items()}
    # A line through each round, so that the slope has a spread of its own.
    slopes = [slope([ratios[count][index] for count in tasks]) for index in range(pairs)]
    return {
        "pairs": pairs,
        "formats": {"plain": plain_format, "ours": our_format},
        "time, median and quartiles": {count: quartiles(values) for count, values in ratios.items()},
        "multiply-adds": multiply_adds,
        "slope of time, median and quartiles": quartiles(slopes),
        "slope of multiply-adds": slope(list(multiply_adds.values())),
    }


@pytest.mark.parametrize("name", CASES)
def test_cost_of_a_random_subnet(benchmark, request, name):
    found = benchmark.pedantic(measure, args=(name, request.config.getoption("--pairs")), rounds=1)
    time, low, high = found["slope of time, median and quartiles"]
    benchmark.extra_info["plain steps a random subnet"] = f"{time:.2f} ({low:.2f}-{high:.2f})"
    benchmark.extra_info["of multiply-adds"] = f"{found['slope of multiply-adds']:.2f}"


def draw(cases: dict[str, dict[str, Any]], detail: str, path: Path) -> None:
    """Time and multiply-adds over the number of random subnets, a panel a network."""
    figure, panels = new_figure(10, 4.6, columns=len(cases))
    top = max(value for case in cases.values() for _, _, value in case["time, median and quartiles"].values())
    for axes, (name, case) in zip(panels, cases.items(), strict=True):
        times = list(case["time, median and quartiles"].values())
        median, low, high = (list(column) for column in zip(*times, strict=True))
        axes.fill_between(RANDOM_SUBNETS, low, high, color=SUPERNET, alpha=0.15, linewidth=0)
        lines = (
            ("time", median, SUPERNET, "-", "o", case["slope of time, median and quartiles"][0]),
            ("multiply-adds", list(case["multiply-adds"].values()), ALONE, "--", "D", case["slope of multiply-adds"]),
        )
        for what, values, color, style, marker, per_subnet in lines:
            label = f"{what}: {per_subnet:.2f} a random subnet"
            axes.plot(RANDOM_SUBNETS, values, color=color, linestyle=style, marker=marker, linewidth=2, label=label)
        axes.set_xticks(RANDOM_SUBNETS)
        axes.set_ylim(0, 1.15 * top)
        axes.set_xlabel("random subnets a step, besides the widest and the narrowest", fontsize=10, color=MUTED)
        axes.legend(frameon=False, fontsize=10, labelcolor=INK, loc="upper left")
        set_titles(axes, name, detail if axes is panels[0] else "")
    panels[0].set_ylabel("plain steps of the full width", fontsize=11, color=MUTED)
    save_figure(figure, path)


def main() -> None:
    """Measures, writes and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="rounds, at least 2")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    where = machine()  # now: the commit may change while it runs
    cases: dict[str, dict[str, Any]] = {}
    for name, (_, dtype, batch, pixels) in CASES.items():
        cases[name] = {"dtype": dtype, "batch": batch, "pixels": pixels, **measure(name, options.pairs)}
        print(name, json.dumps(cases[name]), flush=True)
    what = "bench_subnets.py: steps of max + min + n random subnets in plain steps, all n and the plain step in turns"
    write_atomically(options.out, json.dumps({"machine": where, "what": what, "cases": cases}, indent=1) + "\n")
    _, dtype, batch, pixels = CASES["ResNet-18"]
    threads = where["cpu"].rpartition(", ")[2]
    draw(cases, f"{dtype}, {batch} images of {pixels} px, {threads}, medians of {options.pairs}", options.picture)


if __name__ == "__main__":
    main()
