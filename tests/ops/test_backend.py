"""Who computes an op is a pure function of op, target, dtype and shape: also for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from fastslim import _ext, errors, ops
from fastslim.ops import backend, measured

BF16 = torch.bfloat16
GPU_OPS = {  # an op, and the rest of a call's key
    "batch_norm_act": (),
    "prefix_pack": (),
    "sandwich_loss": (False,),
    "depthwise_conv2d": (),
}


@pytest.fixture
def fresh(monkeypatch):
    """No choice is remembered, and none is remembered afterwards."""

    def forget():
        backend.forget()

    forget()
    yield forget
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("op", GPU_OPS)
def test_on_a_gpu_our_kernels_come_first_cuda_before_triton(op, fresh, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(_ext, "CUDA_UNUSABLE", None)
    assert backend.choose(op, "sm_90", BF16, *GPU_OPS[op]).backend == "cuda"
    monkeypatch.setattr(_ext, "CUDA_UNUSABLE", "built without CUDA")
    fresh()
    assert backend.choose(op, "sm_90", BF16, *GPU_OPS[op]).backend == "triton"


@pytest.mark.parametrize("op", ["slim_conv2d", "slim_linear"])
def test_on_a_gpu_dense_products_go_to_the_library(op):
    choice = backend.choose(op, "sm_90", BF16)
    assert choice.backend == "library"
    assert "cuBLAS" in choice.reason


@pytest.mark.parametrize("op", [*GPU_OPS, "slim_conv2d", "slim_linear"])
def test_a_gpu_older_than_sm_80_takes_torchs_kernels_and_says_why(op, fresh, monkeypatch):
    monkeypatch.setattr(_ext, "CUDA_UNUSABLE", None)
    shape = GPU_OPS.get(op, ())
    choice = backend.choose(op, "sm_75", torch.float16, *shape)
    assert choice.backend in ("library", "reference")
    with ops.use_backend("triton"):
        choice = backend.choose(op, "sm_75", torch.float16, *shape)
    assert choice.backend in ("library", "reference")
    assert "sm_80" in choice.reason


@pytest.mark.parametrize("op", GPU_OPS)
def test_other_accelerators_take_torchs_kernels(op):
    for target in ("hip", "mps", "meta"):
        assert backend.choose(op, target, torch.float32, *GPU_OPS[op]).backend in ("library", "reference")


def test_what_was_measured_nearest_decides(fresh, monkeypatch, tmp_path):
    kind = measured.key("op", BF16, 3, 1)
    rows = [dict(key=kind, sizes=[64, 100], best="triton"), dict(key=kind, sizes=[512, 10000], best="library")]
    (tmp_path / "sm_90.json").write_text(json.dumps(dict(device="a GPU", commit="abc", rows=rows)))
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    monkeypatch.setattr(_ext, "CUDA_UNUSABLE", None)
    otherwise = backend.Choice("library", "")

    def choice(sizes, exact=(3, 1)):
        return backend.gpu_choice("op", "sm_90", BF16, ("cuda", "triton"), otherwise, exact, sizes)

    assert choice((72, 90)) == ("triton", "measured fastest on a GPU at abc")
    assert choice((384, 9000)).backend == "library"
    assert choice((64, 100), exact=(5, 1)) == ("cuda", "estimated fastest; not measured on sm_90 yet")
    monkeypatch.setattr(backend, "unusable", lambda name, target: "is not here")
    assert choice((72, 90)).backend == "library"  # a record of what cannot run here does not count


def test_forcing_what_an_op_lacks_or_cannot_compute_says_so():
    with ops.use_backend("cuda"):
        choice = backend.choose("slim_linear", "cpu", torch.float32)
    assert choice.backend == "library"
    assert "slim_linear has none" in choice.reason
    with ops.use_backend("cpp"):
        choice = backend.choose("slim_linear", "cpu", torch.float64)
    assert choice.backend == "library"
    assert "float32 or bfloat16" in choice.reason
    with ops.use_backend("cuda"):
        choice = backend.choose("batch_norm_act", "cpu", torch.float32)
    assert choice.backend == "cpp"
    assert "NVIDIA GPUs" in choice.reason


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(errors.FastslimValueError, match=r"no backend 'cudda'.*did you mean 'cuda'.*triton"):
        ops.use_backend("cudda").__enter__()
    environment = {**os.environ, "FASTSLIM_BACKEND": "gpu"}
    done = subprocess.run([sys.executable, "-c", "import fastslim"], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "known are reference, library, cpp, cuda, triton" in done.stderr


def test_importing_fastslim_defines_every_kernels_op_and_leaves_triton_alone():
    script = """if True:
        import sys, torch, fastslim
        from fastslim.ops import backend
        assert "triton" not in sys.modules
        for op, backends in backend.registered_ops().items():
            assert "triton" not in backends or hasattr(torch.ops.fastslim, op + "_triton"), op
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_reason_names_only_what_refuses():
    for dtype in (BF16, torch.float64):
        for target in ("sm_90", "mps"):
            for form in ((), ("forward", False)):
                assert "None" not in ops.choose("depthwise_conv2d", target, dtype, *form).reason
