"""How every benchmark measures: rivals interleaved in one process, medians of paired ratios, one table at the end."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

Run = Callable[[], object]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pairs", type=int, default=20, help="interleaved repetitions per benchmark (default 20)")


@pytest.fixture
def against(benchmark, request) -> Callable[..., dict[str, float]]:
    """Times `ours`, and each rival right before it; records the median of ours / rival and its quartiles."""
    pairs = request.config.getoption("--pairs")

    def measure(ours: Run, **rivals: Run) -> dict[str, float]:
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
        medians = {}
        for name, theirs in times.items():
            ratios = [a / b for a, b in zip(mine, theirs[-len(mine) :], strict=True)]
            low, medians[name], high = statistics.quantiles(ratios, n=4)
            benchmark.extra_info[f"ours / {name}"] = f"{medians[name]:.2f} ({low:.2f}-{high:.2f})"
        return medians

    return measure


def machine() -> dict[str, str]:
    """What every figure is reported with."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or os.environ.get("FASTSLIM_COMMIT", "unknown"),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


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
