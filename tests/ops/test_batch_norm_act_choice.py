"""Who computes batch_norm_act: told from the target, the data type and the segments alone."""

from __future__ import annotations

import pytest
import torch

from fastslim import _ext
from fastslim.ops import backend, choose, use_backend


@pytest.fixture(params=[None, "built without CUDA"], ids=["cuda_built", "without_cuda"])
def built(request, monkeypatch):
    """Whether the CUDA library is usable; choices are made anew."""
    monkeypatch.setattr(_ext, "CUDA_UNUSABLE", request.param)
    backend.forget()
    yield request.param is None
    backend.forget()


def chosen(dtype=torch.bfloat16, target="sm_90", segments=1):
    return choose("batch_norm_act", target, dtype, True, 4096, 64, segments)


def test_a_gpu_takes_cuda_where_it_is_built_and_triton_where_not(built):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert chosen(dtype).backend == ("cuda" if built else "triton")


def test_only_cuda_computes_float64(built):
    assert chosen(torch.float64).backend == ("cuda" if built else "reference")
    with use_backend("triton"):
        choice = chosen(torch.float64)
    assert choice.backend != "triton"
    assert "'triton' was asked for but computes float32, bfloat16, float16, not float64" in choice.reason


def test_more_segments_than_a_kernel_takes_go_elsewhere(built):
    with use_backend("cuda"):
        choice = chosen(segments=65)
    assert choice.backend == "triton"
    assert ("takes at most 64 segments, not 65" if built else "built without CUDA") in choice.reason


def test_old_gpus_and_other_devices_take_the_reference_and_say_why(built):
    assert chosen(target="sm_75").backend == chosen(target="mps").backend == "reference"
    assert "compute capability 8.0" in chosen(target="sm_75").reason
    assert "computes on NVIDIA GPUs" in chosen(target="mps").reason


def test_integers_are_refused_by_every_kernel(built):
    assert chosen(torch.int8).backend == "reference"
