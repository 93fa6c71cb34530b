"""How every benchmark measures: rivals interleaved in one process, medians of paired ratios, one table at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

import pytest

from fastslim.bench import Ratio, Run, machine, ratio_of

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "6"
)  # torch's profiler, which memory is measured with, writes lines of its own


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pairs", type=int, default=20, help="interleaved repetitions per benchmark (default 20)")


def judged(value: float, shown: object, bar: float | None) -> str:
    """A figure beside the largest that it should be."""
    if bar is None:
        return str(shown)
    return f"{shown}, {'ABOVE' if value > bar else 'within'} {bar:.2f}"


@pytest.fixture
def against(benchmark, request) -> Callable[..., dict[str, Ratio]]:
    """Times `ours`, and each rival right before it; records the median of ours / rival and its quartiles.

    `bars` names the largest ratio that is wanted against a rival; the table says whether it holds. A bar against
    the floor is the `kernel`'s, if one is given: what `ours` calls, without Python and autograd around it.
    """
    pairs = request.config.getoption("--pairs")

    def measure(
        ours: Run, bars: Mapping[str, float] | None = None, kernel: Run | None = None, **rivals: Run
    ) -> dict[str, Ratio]:
        bars = dict(bars or {})
        if kernel is not None:
            rivals["kernel"] = kernel
        times: dict[str, list[float]] = {name: [] for name in rivals}

        def run_rivals() -> None:
            for name, rival in rivals.items():
                start = time.perf_counter()
                rival()
                times[name].append(time.perf_counter() - start)

        benchmark.pedantic(ours, setup=run_rivals, rounds=pairs, warmup_rounds=2)
        if benchmark.stats is None:  # --benchmark-disable: run once, measure nothing
            return {}
        mine = benchmark.stats.stats.data
        ratios = {name: ratio_of(mine, theirs[-len(mine) :]) for name, theirs in times.items()}
        if kernel is not None:
            del ratios["kernel"]
            alone = ratio_of(times["kernel"][-len(mine) :], times["floor"][-len(mine) :])
            benchmark.extra_info["kernel / floor"] = judged(alone.median, alone, bars.pop("floor"))
        for name, ratio in ratios.items():
            benchmark.extra_info[f"ours / {name}"] = judged(ratio.median, ratio, bars.get(name))
        return ratios

    return measure


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info["fastslim"] = machine()


def pytest_terminal_summary(terminalreporter) -> None:
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    rows = [b for b in getattr(session, "benchmarks", []) if b.extra_info]
    if not rows:
        return
    terminalreporter.section("ratios: median (quartiles) of interleaved pairs")
    for row in rows:
        terminalreporter.write_line(f"{row.name}: " + ", ".join(f"{k} {v}" for k, v in row.extra_info.items()))
    terminalreporter.write_line(", ".join(f"{k} {v}" for k, v in machine().items()))
