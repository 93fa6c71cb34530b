"""The page about the GPU kernels: one row a kernel and architecture, and problems in plain sight."""

from __future__ import annotations

import kernel_table
import pytest
import resources
from resources import Resources

SMALL = Resources("gemm_kernel<float, 3>", "sm_90a", 128, 40, 1024, 0, 4, "", "memory")
LARGE = SMALL._replace(name="gemm_kernel<bfloat16, 5>", registers=64, shared=4096, wide=8)
SPILLING = Resources("spilling_kernel[bf16]", "sm_80", 256, 255, 0, 16, 0, "", "memory")
BROKEN = Resources("broken_kernel[fp32]", "sm_80", 128, 0, 0, 0, 0, "", failure="CompilationError: a | b\nc")


@pytest.fixture
def lines(monkeypatch):
    monkeypatch.setattr(kernel_table, "_versions", lambda: "nvcc 13.0")
    kernels = [("csrc/cuda/gemm.cu", SMALL), ("csrc/cuda/gemm.cu", LARGE), ("kernels/a.py", SPILLING)]
    return kernel_table.page([*kernels, ("kernels/a.py", BROKEN)]).splitlines()


def test_programs_of_a_kernel_share_a_row(lines):
    assert lines.count("## `csrc/cuda/gemm.cu`") == lines.count("## `kernels/a.py`") == 1
    (row,) = [line for line in lines if "gemm_kernel" in line]
    expected = "| `gemm_kernel` | sm_90a | 2 | 128 | 40 - 64 | 1024 - 4096 | 50 - 75 % | 4 - 8 | - | none |"
    assert row == expected


def test_problems_stand_in_the_row_and_do_not_break_the_table(lines):
    (spilling,) = [line for line in lines if "spilling_kernel" in line]
    assert "16 bytes of local memory a thread; no 16-byte access to global memory" in spilling
    (broken,) = [line for line in lines if "broken_kernel" in line]
    assert broken.endswith("| CompilationError: a \\| b c |")
    tables = [line for line in lines if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in tables} == {len(kernel_table.COLUMNS) + 1}


def test_page_is_replaced_only_when_everything_compiles(monkeypatch, tmp_path):
    page = tmp_path / "docs.md"
    page.write_text("before")
    monkeypatch.setattr(kernel_table, "PAGE", page)
    monkeypatch.setattr(resources, "ROOT", tmp_path)

    def fails():
        yield "a.cu", SMALL
        raise RuntimeError("nvcc: error")

    monkeypatch.setattr(resources, "all_resources", fails)
    with pytest.raises(RuntimeError, match="nvcc: error"):
        kernel_table.main()
    assert page.read_text() == "before"
    monkeypatch.setattr(kernel_table, "_versions", lambda: "nvcc 13.0")
    monkeypatch.setattr(resources, "all_resources", lambda: iter([("a.cu", SMALL)]))
    kernel_table.main()
    assert "gemm_kernel" in page.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["docs.md"]
