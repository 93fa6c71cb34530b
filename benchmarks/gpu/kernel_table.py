"""Writes docs/gpu-kernels.md: what every GPU kernel needs of the chip, as the compilers tell it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import resources
from resources import Resources

PAGE = resources.ROOT / "docs/gpu-kernels.md"
INTRODUCTION = """# GPU kernels

What every kernel needs of the chip, read off the compilers' output without a GPU:
{versions}.
`python benchmarks/gpu/resources.py` writes this page; the tests check every line of it.

A row stands for all programs of a kernel (template arguments, data types, tile sizes) on one architecture, with the
smallest and the largest number. Registers are a thread's, shared memory is a block's (of CUDA C++ without what is asked
for at launch), occupancy is the share of a multiprocessor's threads that can be resident. Wide accesses are the
instructions that move 16 bytes of global memory a thread, or a whole tile; kernels that are bound by memory need them.
No kernel may spill registers to local memory.
"""
COLUMNS = (
    "kernel", "architecture", "programs", "threads", "registers", "shared bytes", "occupancy", "wide accesses",
    "tensor cores", "problems",
)  # fmt: skip


def page(kernels: Iterable[tuple[str, Resources]]) -> str:
    """The page's text.

    Args:
        kernels: file and resources of each, as `resources.all_resources` yields them.
    """
    files: dict[str, dict[tuple[str, str], list[Resources]]] = {}
    for file, kernel in kernels:
        name = re.split(r"[<\[]", kernel.name)[0]
        files.setdefault(file, {}).setdefault((name, kernel.architecture), []).append(kernel)
    parts = [INTRODUCTION.format(versions=_versions())]
    for file, groups in files.items():
        rows = [_row(name, architecture, groups[name, architecture]) for name, architecture in sorted(groups)]
        lines = [COLUMNS, ("---",) * 2 + ("---:",) * (len(COLUMNS) - 4) + ("---",) * 2, *rows]
        parts += [f"## `{file}`\n", "".join(f"| {' | '.join(line)} |\n" for line in lines)]
    return "\n".join(parts)


def main() -> None:
    """Compiles everything and replaces the page at once, or not at all."""
    text = page(resources.all_resources())
    with tempfile.NamedTemporaryFile("w", dir=PAGE.parent, suffix=".md", delete=False) as file:
        file.write(text)
    Path(file.name).chmod(0o644)
    os.replace(file.name, PAGE)
    print(f"{PAGE.relative_to(resources.ROOT)}: {text.count(chr(10))} lines")


def _row(name: str, architecture: str, programs: list[Resources]) -> tuple[str, ...]:
    problems = sorted({problem for program in programs for problem in program.problems()})
    matrix = sorted({program.tensor_core for program in programs if program.tensor_core})
    compiled = [program for program in programs if not program.failure]
    return (
        f"`{name}`",
        architecture,
        str(len(programs)),
        _range(compiled, lambda p: p.threads),
        _range(compiled, lambda p: p.registers),
        _range(compiled, lambda p: p.shared),
        _range(compiled, lambda p: round(100 * p.occupancy), " %"),
        _range(compiled, lambda p: p.wide),
        ", ".join(matrix) or "-",
        "; ".join(problems).replace("\n", " ").replace("|", "\\|") or "none",
    )


def _range(programs: list[Resources], number: Callable[[Resources], int], unit: str = "") -> str:
    numbers = [number(program) for program in programs]
    if not numbers:
        return "-"
    smallest, largest = min(numbers), max(numbers)
    return f"{smallest}{unit}" if smallest == largest else f"{smallest} - {largest}{unit}"


def _versions() -> str:
    nvcc = resources.tool("nvcc")
    release = re.search(r"release [\d.]+, V([\d.]+)", resources.run("nvcc", "--version")) if nvcc else None
    triton = importlib.metadata.version("triton")
    ptxas = re.search(r"release [\d.]+, V([\d.]+)", resources.run("ptxas", "--version"))
    return f"nvcc {release[1] if release else 'absent'}, Triton {triton} with ptxas {ptxas[1] if ptxas else 'unknown'}"
