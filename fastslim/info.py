"""What this installation is made of, what is usable, and why not: ``python -m fastslim.info``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

import fastslim.ops  # noqa: F401  (registers every op)
from fastslim import _ext
from fastslim.graph import Report, count_cost
from fastslim.graph.report import count
from fastslim.ops import backend

VARIABLES = ("FASTSLIM_BACKEND", "FASTSLIM_CPU_ISA", "OMP_NUM_THREADS", "TRITON_INTERPRET")


def describe() -> str:
    """The report as plain text: versions, libraries, environment variables, and one line per op."""
    return "\n\n".join(
        [
            _table([("package", "version"), *_versions()]),
            _table([("library", "state"), *_libraries()]),
            _table([("environment variable", "value"), *((name, os.getenv(name, "not set")) for name in VARIABLES)]),
            _table([("op", "target", "backend in use", "all backends", "why"), *_ops()]),
        ]
    )


def describe_costs(report: Report) -> str:
    """Parameters and multiply-adds (of one sample) of a converted network's widest and narrowest subnet."""
    mutator = report.mutator
    rows: list[tuple[str, ...]] = [("subnet", "parameters", "multiply-adds")]
    for name, choices in (("widest", mutator.max_choices), ("narrowest", mutator.min_choices)):
        cost = count_cost(mutator.trace, choices)
        rows.append((name, count(cost.parameters), count(cost.multiply_adds)))
    return _table(rows)


def _versions() -> list[tuple[str, ...]]:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return [
        ("fastslim", f"{_installed('fastslim')} in {Path(__file__).parent}"),
        ("python", f"{platform.python_version()} ({sys.platform}, {platform.machine()})"),
        ("torch", f"{torch.__version__} ({cuda}, {torch.get_num_threads()} threads)"),
        ("triton", _installed("triton")),
    ]


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _libraries() -> list[tuple[str, ...]]:
    built = _ext.BUILD
    cpu = f"usable, {built['cpu_isa']} kernels; built by {built['compiler']} for torch {built['torch']}"
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [
        ("_C (CPU)", cpu),
        ("_C_cuda", f"not usable: {_ext.CUDA_UNUSABLE}" if _ext.CUDA_UNUSABLE else "usable"),
        ("CUDA devices", ", ".join(devices) or "none"),
    ]


def _ops() -> list[tuple[str, ...]]:
    targets = {"cpu": torch.float32}  # and what one trains in there
    for index in range(torch.cuda.device_count()):
        targets[backend.target_of(torch.empty(0, device=f"cuda:{index}"))] = torch.bfloat16
    rows: list[tuple[str, ...]] = []
    for op, backends in sorted(backend.registered_ops().items()):
        for target, dtype in targets.items():
            try:
                choice = backend.choose(op, target, dtype)
            except TypeError:  # this op's rule also looks at the shape
                choice = backend.Choice("by shape", "decided by the shape of each call")
            name = f"{target} {str(dtype).removeprefix('torch.')}"
            rows.append((op, name, choice.backend, ", ".join(backends), choice.reason))
    return rows


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


if __name__ == "__main__":
    print(describe())
