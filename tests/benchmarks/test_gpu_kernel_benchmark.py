"""The kernel benchmark: its gate finds wrong results, and its clock measures."""

from __future__ import annotations

import time

import kernel_cases
import kernel_times
import prepared
import pytest
import timing
import torch
from arithmetic import H200, Cost
from timing import Spread

from fastslim.ops import backend

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _without_triton(monkeypatch):
    """Its interpreter is slow, and its kernels have tests of their own."""
    unusable = backend.unusable
    monkeypatch.setattr(
        backend, "unusable", lambda b, t: "computes on NVIDIA GPUs" if b == "triton" else unusable(b, t)
    )
    backend.forget()
    yield
    backend.forget()


def small(op, direction):
    return next(case for case in kernel_cases.small_cases() if (case.op, case.direction) == (op, direction))


@pytest.mark.parametrize("case", list(kernel_cases.small_cases()), ids=lambda c: f"{c.op}-{c.direction}-{c.shape}")
def test_backends_of_the_cpu_pass_the_gate(case):
    times, failed, _ = kernel_times.measure(case, CPU, torch.bfloat16, repeats=1)
    assert "reference" in times
    assert [reason for reason in failed.values() if "error" in reason or "failed" in reason] == []


def test_wrong_result_is_not_timed():
    case = small("depthwise_conv2d", "forward")

    def wrong(inputs):
        return case.call(inputs) * (1.01 if backend.forced_backend() == "library" else 1.0)

    times, failed, _ = kernel_times.measure(case._replace(call=wrong), CPU, torch.float32, repeats=1)
    assert "library" not in times
    assert "error" in failed["library"]


def test_upstream_gradient_does_not_depend_on_the_memory_format():
    case = small("depthwise_conv2d", "backward_input")
    inputs = case.inputs(CPU, torch.float32)
    other = case._replace(call=lambda given: case.call(given).contiguous())
    ours, theirs = (prepared.Prepared(one, inputs, torch.float32) for one in (case, other))
    assert ours.upstream.stride() != theirs.upstream.stride()
    assert torch.equal(ours.upstream, theirs.upstream)


def test_backend_that_cannot_compute_the_call_says_why():
    case = small("batch_norm_act", "forward")
    ready, reason = kernel_times.usable(case, "cuda", case.inputs(CPU, torch.float32), torch.float32)
    assert ready is None
    assert "computes on NVIDIA GPUs" in reason


def test_gate_sees_nan_and_missing_results():
    assert prepared.relative_error([torch.tensor([torch.nan])], [torch.ones(1)]) == float("inf")
    assert prepared.relative_error([], [torch.ones(1)]) == float("inf")
    assert prepared.relative_error([torch.tensor([3.0, 4.5])], [torch.tensor([3.0, 4.0])]) == pytest.approx(0.1)


def test_unwritten_memory_is_nan():
    with prepared.poisoned():
        assert torch.empty(5).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_row_compares_with_what_binds():
    case = small("depthwise_conv2d", "forward")._replace(cost=Cost(bytes=4_300_000, flops=1))
    row = kernel_times.row_of(case, "cuda", Spread(2.0, 1.9, 2.2, 20), H200)
    assert row[2:] == ["cuda", 2.0, "1.9-2.2", "2150 GB/s", 50.0, 1.0, "bytes"]


def test_inputs_rotate_beyond_the_cache():
    gpu = torch.device("cuda")
    assert timing.input_sets(300 << 20, gpu) == 2
    assert timing.input_sets(10 << 20, gpu) == 13
    assert timing.input_sets(10, gpu) == 64
    assert timing.input_sets(10, CPU) == 1


def test_rivals_take_turns():
    order = []

    def rival(name, seconds):
        def run(call):
            order.append(name)
            time.sleep(seconds)

        return run

    times = timing.interleaved({"a": rival("a", 0.002), "b": rival("b", 0.001)}, CPU, repeats=3)
    assert order == ["a", "b"] + ["a", "b"] * 3
    assert times["a"].median > 2000
    assert times["a"].count == 3
    assert times["a"].low <= times["a"].median <= times["a"].high
