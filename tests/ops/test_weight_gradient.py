"""Where weight gradients go, and which route and backend products take on a GPU and why."""

from __future__ import annotations

import pytest
import torch

from fastslim.ops import backend, measured, slim_linear, weight_gradient
from fastslim.ops.step_buffers import StepBuffers
from fastslim.ops.weight_gradient import GradientSink, add_product, product_route

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("target", "dtype", "refused", "route", "reason"),
    [
        ("cpu", FP32, None, "addmm", "straight into the gradient"),
        ("sm_90", FP32, None, "addmm", "straight into the gradient"),
        ("cpu", BF16, None, "mm", "only GPUs"),
        ("sm_90", BF16, "self and mat2 must have the same dtype", "mm", "same dtype"),
        ("sm_90", BF16, None, "addmm_dtype", "not measured on sm_90 yet"),
    ],
)
def test_route_of_a_product_and_its_reason(target, dtype, refused, route, reason) -> None:
    choice = product_route(target, dtype, FP32, (3136, 64, 256), refused)
    assert choice.backend == route
    assert reason in choice.reason


@pytest.fixture
def recorded(monkeypatch):
    """Records a choice for an invented GPU."""

    def record(kind: str, best: str) -> None:
        rows = {kind: [((3136.0, 64.0, 256.0), measured.Best(best, "a GPU at abc"))]}
        monkeypatch.setattr(measured, "_table", lambda target: rows if target == "sm_90" else {})
        backend.forget()

    yield record
    backend.forget()


def test_a_record_flips_the_route(recorded) -> None:
    recorded("matrix_gradient bfloat16", "mm")
    assert product_route("sm_90", BF16, FP32, (3136, 64, 256), None) == ("mm", "measured fastest on a GPU at abc")
    assert product_route("sm_80", BF16, FP32, (3136, 64, 256), None).backend == "addmm_dtype"


CALLS = {
    "slim_linear": ("slim_linear.forward bfloat16", ("forward", (3136, 64, 256))),
    "slim_conv2d": (
        "slim_conv2d.forward bfloat16 3x3 s2",
        ("forward", True, (3, 3), (2, 2), 1, (3136, 64, 256)),
    ),
}


@pytest.mark.parametrize("op", CALLS)
def test_dense_products_on_a_gpu_are_the_librarys_until_a_record_says_triton(op, recorded) -> None:
    kind, call = CALLS[op]
    natural = backend.choose(op, "sm_90", BF16, *call)
    assert natural.backend == "library"
    assert "Triton where a record says it is faster" in natural.reason
    recorded(kind, "triton")
    assert backend.choose(op, "sm_90", BF16, *call) == ("triton", "measured fastest on a GPU at abc")
    assert backend.choose(op, "sm_80", BF16, *call).backend == "library"
    assert backend.choose(op, "cpu", torch.float64, *call).backend == "library"


def test_triton_that_is_forced_says_what_it_cannot_compute() -> None:
    with backend.use_backend("triton"):
        assert backend.choose("slim_linear", "sm_90", BF16).backend == "triton"
        refused = {
            "float64": backend.choose("slim_linear", "sm_90", torch.float64),
            "channels_last": backend.choose("slim_conv2d", "sm_90", BF16, "forward", False),
            "groups": backend.choose("slim_conv2d", "sm_90", BF16, "forward", True, (3, 3), (1, 1), 4),
            "sm_80": backend.choose("slim_linear", "sm_75", BF16),
        }
    for named, choice in refused.items():
        assert choice.backend == "library"
        assert named in choice.reason


@pytest.mark.parametrize("segments", [None, ((0, 5), (9, 6))])
def test_float32_results_of_16_bit_operands_are_added_in_place(segments, monkeypatch) -> None:
    """The GPU's route with its one call replaced, which the CPU does not have."""

    def in_float32(region, grads, inputs, accumulate):
        region.addmm_(grads.float().t(), inputs.float(), beta=int(accumulate))

    monkeypatch.setattr(weight_gradient, "_addmm_dtype", in_float32)
    monkeypatch.setattr(backend, "is_gpu", lambda target: True)
    monkeypatch.setattr(weight_gradient, "_addmm_dtype_refused", lambda device, dtype: None)
    weight, grads, inputs = torch.zeros(8, 16, requires_grad=True), torch.randn(30, 7), torch.randn(30, 11)
    grads, inputs = grads.bfloat16(), inputs.bfloat16()
    columns = range(11) if segments is None else [*range(5), *range(9, 15)]
    expected = torch.zeros(8, 16, dtype=torch.float64)
    expected[:7, list(columns)] = 2 * grads.double().t() @ inputs.double()
    buffers = StepBuffers([weight])
    buffers.begin()
    for _ in range(2):
        add_product(GradientSink(weight, buffers.slot(weight), everything=False), grads, inputs, segments)
    buffers.finish()
    torch.testing.assert_close(weight.grad.double(), expected, rtol=1e-6, atol=1e-5)


def test_a_sink_without_a_slot_returns_a_gradient_that_is_zero_outside_the_prefix() -> None:
    sink = GradientSink(torch.ones(4, 6), None, everything=False)
    sink.add(torch.ones(2, 3), sink.full[:2, :3])
    assert sink.returned.sum() == 6
    assert sink.target() == (sink.full, False)


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [False, True])
def test_addmm_adds_float32_results_to_a_strided_prefix(accumulate) -> None:
    grads, inputs = (torch.randn(3000, c, device="cuda", dtype=BF16) for c in (40, 72))
    full = torch.full((64, 96), 0.5, device="cuda")
    if reason := weight_gradient._addmm_dtype_refused(full.device, BF16):
        pytest.skip(reason)
    weight_gradient._addmm_dtype(full[:40, :72], grads, inputs, accumulate)
    true = grads.double().t() @ inputs.double() + 0.5 * accumulate
    torch.testing.assert_close(full[:40, :72].double(), true, rtol=1e-5, atol=1e-3)
    assert full[40:].eq(0.5).all()
    assert full[:, 72:].eq(0.5).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_a_step_on_a_gpu_adds_the_weight_gradient_of_every_pass(dtype) -> None:
    x, weight = torch.randn(500, 48, device="cuda"), torch.randn(64, 96, device="cuda", requires_grad=True)
    buffers = StepBuffers([weight])
    buffers.begin()
    with buffers.active(), torch.autocast("cuda", dtype):
        for c_out in (64, 40):
            slim_linear(x, weight, c_out=c_out).sum().backward()
    buffers.finish()
    sums = x.to(dtype).double().sum(0)
    expected = torch.zeros(64, 96, dtype=torch.float64, device="cuda")
    expected[:, :48] += sums
    expected[:40, :48] += sums
    torch.testing.assert_close(weight.grad.double(), expected, rtol=2e-2, atol=2e-2)
