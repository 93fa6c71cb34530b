"""Every compiled op is found under one stem: header, kernels, binding, Python op, test, benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU_OPS = sorted(path.stem.removesuffix("_cpu") for path in ROOT.glob("csrc/torch/*_cpu.cpp"))
CUDA_OPS = sorted(path.stem.removesuffix("_cuda") for path in ROOT.glob("csrc/torch/*_cuda.cpp"))
NO_OP = ("dispatch", "vec")
OF_EVERY_OP = ("fastslim/ops/{}.py", "tests/ops/test_{}.py", "benchmarks/bench_{}.py")
OF_A_CPU_OP = ("csrc/include/fastslim/{}.h", "csrc/cpu/{}*.cpp", *OF_EVERY_OP)
OF_A_CUDA_OP = (
    "csrc/include/fastslim/{}_cuda.h",
    "csrc/cuda/{}*.cu",
    "tests/cuda_emulation/test_{}_cuda.py",
    *OF_EVERY_OP,
)


@pytest.mark.parametrize("op", CPU_OPS)
@pytest.mark.parametrize("pattern", OF_A_CPU_OP)
def test_cpu_op_has(op, pattern):
    assert list(ROOT.glob(pattern.format(op)))


@pytest.mark.parametrize("op", CUDA_OPS)
@pytest.mark.parametrize("pattern", OF_A_CUDA_OP)
def test_cuda_op_has(op, pattern):
    assert list(ROOT.glob(pattern.format(op)))


@pytest.mark.parametrize(("folder", "ops"), [("csrc/cpu", CPU_OPS), ("csrc/cuda", CUDA_OPS)])
def test_every_kernel_file_is_named_after_its_op(folder, ops):
    stems = {path.stem for path in (ROOT / folder).glob("*.*")} - set(NO_OP)
    assert ops
    assert {stem for stem in stems if not stem.startswith(tuple(ops))} == set()


@pytest.mark.parametrize("folder", ["csrc/cpu", "csrc/cuda", "csrc/include"])
def test_kernels_know_no_torch(folder):
    for path in sorted((ROOT / folder).rglob("*.*")):
        assert "torch/" not in path.read_text(), path
        assert "pybind11" not in path.read_text(), path
