"""The emulation itself finds what would hang or go wrong on a GPU."""

from __future__ import annotations

import subprocess

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


def test_dynamic_shared_memory_is_nan_until_written(tmp_path):
    done = run(
        tmp_path,
        "int wrong = 0;\n"
        "__global__ void kernel() {\n"
        "  FASTSLIM_DYNAMIC_SHARED(bytes);\n"
        "  float* values = reinterpret_cast<float*>(bytes);\n"
        "  wrong += values[threadIdx.x] == values[threadIdx.x];\n"
        "  __syncthreads();\n"
        "  values[threadIdx.x] = float(threadIdx.x);\n"
        "  __syncthreads();\n"
        "  wrong += values[threadIdx.x ^ 1] != float(threadIdx.x ^ 1);\n"
        "}\n"
        "int main() { FASTSLIM_LAUNCH_SHARED(kernel, 2, 64, 256, nullptr); return wrong; }\n",
    )
    assert done.returncode == 0


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
