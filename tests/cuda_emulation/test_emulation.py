"""The emulation itself finds what would hang or go wrong on a GPU."""

from __future__ import annotations

import subprocess

import pytest
import torch
from emulation import compiled


def run(tmp_path, source: str) -> subprocess.CompletedProcess:
    (tmp_path / "program.cpp").write_text(f'#include "fastslim/cuda_launch.h"\n{source}')
    program = compiled(tmp_path / "program.cpp", tmp_path / "program")
    return subprocess.run([str(program)], capture_output=True, text=True)


def test_a_barrier_that_not_all_threads_reach_is_found(tmp_path):
    done = run(
        tmp_path,
        "__global__ void kernel() { if (threadIdx.x < 40) __syncthreads(); else __shfl_down_sync(~0u, 1, 1); }\n"
        "int main() { FASTSLIM_LAUNCH(kernel, 1, 64, nullptr); }\n",
    )
    assert done.returncode != 0
    assert "deadlock" in done.stderr


def test_threads_at_different_barriers_are_found(tmp_path):
    done = run(
        tmp_path,
        "__global__ void kernel() {\n"
        "  if (threadIdx.x < 32) __syncthreads();\n"
        "  else\n"
        "    __syncthreads();\n"
        "}\n"
        "int main() { FASTSLIM_LAUNCH(kernel, 1, 64, nullptr); }\n",
    )
    assert done.returncode != 0
    assert "different barriers" in done.stderr


@pytest.mark.parametrize("wait", ["__shfl_xor_sync(~0u, 1, 1)", "__syncwarp()", "__syncthreads()"])
def test_waiting_for_threads_that_have_returned_is_found(tmp_path, wait):
    done = run(
        tmp_path,
        f"__global__ void kernel() {{ if (threadIdx.x % 32 < 31) {wait}; }}\n"
        "int main() { FASTSLIM_LAUNCH(kernel, 1, 64, nullptr); }\n",
    )
    assert done.returncode != 0
    assert "have returned" in done.stderr


def test_a_missing_barrier_shows_whoever_reads_the_others_value(tmp_path):
    """A thread reads before the other writes in one half of the blocks, or of the launches; after it in the other."""
    done = run(
        tmp_path,
        "int right = 0, all = 0, wrong = 0;\n"
        "__global__ void kernel(int shift) {\n"
        "  __shared__ int values[64];\n"
        "  values[threadIdx.x] = int(threadIdx.x);\n"
        "  const int other = (int(threadIdx.x) + shift) % 64;\n"
        "  right += values[other] == other, all += 1;\n"
        "}\n"
        "int main() {\n"
        "  for (int shift : {1, 31, 32, 63})\n"
        "    for (int grid : {1, 2}) {\n"
        "      right = all = 0;\n"
        "      for (int i = 0; i < 2; ++i) FASTSLIM_LAUNCH(kernel, grid, 64, nullptr, shift);\n"
        "      wrong += 2 * right != all;\n"
        "    }\n"
        "  return wrong;\n"
        "}\n",
    )
    assert done.returncode == 0


def test_blocks_that_need_one_another_are_found(tmp_path):
    done = run(
        tmp_path,
        "int before = -1, wrong = 0;\n"
        "__global__ void kernel() { wrong += before != int(blockIdx.x) - 1, before = int(blockIdx.x); }\n"
        "int main() {\n"
        "  for (int i = 0; i < 4; ++i) before = -1, FASTSLIM_LAUNCH(kernel, 3, 1, nullptr);\n"
        "  return wrong > 0 ? 0 : 1;\n"
        "}\n",
    )
    assert done.returncode == 0


@pytest.mark.parametrize(
    "declaration",
    [
        "FASTSLIM_DYNAMIC_SHARED(bytes); float* values = reinterpret_cast<float*>(bytes);",
        "__shared__ float values[64];",
    ],
    ids=["dynamic", "static"],
)
def test_shared_memory_is_nan_until_written(tmp_path, declaration):
    done = run(
        tmp_path,
        "int wrong = 0;\n"
        "__global__ void kernel() {\n"
        f"  {declaration}\n"
        "  wrong += values[threadIdx.x] == values[threadIdx.x];\n"
        "  __syncthreads();\n"
        "  values[threadIdx.x] = float(threadIdx.x);\n"
        "  __syncthreads();\n"
        "  wrong += values[threadIdx.x ^ 1] != float(threadIdx.x ^ 1);\n"
        "}\n"
        "int main() { FASTSLIM_LAUNCH_SHARED(kernel, 2, 64, 256, nullptr); return wrong; }\n",
    )
    assert done.returncode == 0


@pytest.mark.parametrize("offset", [0, 1])
def test_a_vector_at_an_address_that_is_no_multiple_of_it_stops_the_program(tmp_path, offset):
    done = run(
        tmp_path,
        "alignas(16) float memory[8];\n"
        "__global__ void kernel(const float* p, float* out) {\n"
        "  float values[4];\n"
        "  fastslim::load<4>(p, values);\n"
        "  fastslim::store<4>(out, values);\n"
        "}\n"
        "int main(int arguments, char**) {\n"
        f"  FASTSLIM_LAUNCH(kernel, 1, 1, nullptr, memory + {offset} * arguments, memory + 4);\n"
        "}\n",
    )
    assert done.returncode == 0 if offset == 0 else done.returncode < 0


def test_an_index_beyond_shared_memory_stops_the_program(tmp_path):
    done = run(
        tmp_path,
        "int sum = 0;\n"
        "__global__ void kernel() {\n"
        "  __shared__ int values[32];\n"
        "  values[threadIdx.x] = 1, sum += values[threadIdx.x];\n"
        "}\n"
        "int main(int arguments, char**) { FASTSLIM_LAUNCH(kernel, 1, 32 + arguments, nullptr); }\n",
    )
    assert done.returncode < 0, "stopped by a signal"


def test_half_precision_of_the_host_is_torchs(tmp_path):
    done = run(
        tmp_path,
        "#include <cstdio>\n"
        "int main() {\n"
        "  for (unsigned bits = 0; bits < 65536; ++bits) {\n"
        "    const fastslim::float16 half{uint16_t(bits)};\n"
        "    fastslim::float16 back;\n"
        "    fastslim::from_accumulate(fastslim::to_accumulate(half), &back);\n"
        "    const float up = fastslim::to_accumulate(half) * 1.0002f;\n"
        "    fastslim::float16 rounded;\n"
        "    fastslim::from_accumulate(up, &rounded);\n"
        "    uint32_t single;\n"
        "    std::memcpy(&single, &up, 4);\n"
        '    std::printf("%u %u %u\\n", unsigned(back.bits), single, unsigned(rounded.bits));\n'
        "  }\n"
        "}\n",
    )
    numbers = torch.tensor([[int(n) for n in line.split()] for line in done.stdout.splitlines()])
    halves = torch.arange(65536).to(torch.int16).view(torch.float16)
    nan = halves.isnan()
    assert torch.equal(numbers[:, 0].to(torch.int16).view(torch.float16)[~nan], halves[~nan])
    singles = numbers[:, 1].to(torch.int32).view(torch.float32)
    assert torch.equal(singles.isnan(), nan)
    assert torch.equal(numbers[:, 2].to(torch.int16).view(torch.float16)[~nan], singles.half()[~nan])
    assert numbers[:, 2].to(torch.int16).view(torch.float16)[nan].isnan().all()
