"""Every compiled op is found under one stem: header, kernels, binding, Python op, test, benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU_OPS = sorted(path.stem for path in ROOT.glob("csrc/cpu/*.cpp") if path.stem != "dispatch")
CUDA_OPS = sorted(path.stem for path in ROOT.glob("csrc/cuda/*.cu"))
OF_EVERY_OP = ("fastslim/ops/{}.py", "tests/ops/test_{}.py", "benchmarks/bench_{}.py")


@pytest.mark.parametrize("op", CPU_OPS)
@pytest.mark.parametrize("pattern", ["csrc/include/fastslim/{}.h", "csrc/torch/{}_cpu.cpp", *OF_EVERY_OP])
def test_cpu_op_has(op, pattern):
    assert (ROOT / pattern.format(op)).is_file()


@pytest.mark.parametrize("op", CUDA_OPS)
@pytest.mark.parametrize(
    "pattern",
    [
        "csrc/include/fastslim/{}_cuda.h",
        "csrc/torch/{}_cuda.cpp",
        "tests/cuda_emulation/test_{}.py",
        *OF_EVERY_OP,
    ],
)
def test_cuda_op_has(op, pattern):
    assert (ROOT / pattern.format(op)).is_file()


@pytest.mark.parametrize("folder", ["csrc/cpu", "csrc/cuda", "csrc/include"])
def test_kernels_know_no_torch(folder):
    for path in sorted((ROOT / folder).rglob("*.*")):
        assert "torch/" not in path.read_text() and "pybind11" not in path.read_text(), path


def test_there_are_ops():
    assert CPU_OPS
