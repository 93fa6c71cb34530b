"""batch_norm_act against F.batch_norm + add + activation in float64: exact, repeatable, on every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from batch_norm_act_cases import SHAPES, check, doubled, run, tensors
from cases import DTYPES, LAYOUTS
from torch.nn import functional as F

from fastslim.ops.batch_norm_act import ACTIVATIONS, batch_norm_act, batch_norm_act_reference

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def nan_poisoned_buffers():
    """torch.empty comes filled with NaN: whatever is not written is seen. One thread: tensors are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@by_dtype
@by_layout
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_and_backward_are_as_exact_as_torch(dtype, layout, residual, activation):
    for shape in SHAPES:
        for training in (True, False):
            arguments, dy = tensors(shape, dtype, layout, residual=residual)
            check(arguments, dy, shape[1], training=training, activation=activation)


@by_dtype
@pytest.mark.parametrize("shape", [(64, 33), (2, 3), (5, 6, 11), (3, 4, 2, 5, 7)], ids=str)
def test_any_number_of_dimensions(dtype, shape):
    arguments, dy = tensors(shape, dtype, residual=True)
    if shape != (2, 3):  # two values per channel normalise to +-1: dx is rounding noise
        check(arguments, dy, shape[1], activation="silu")
    check(arguments, dy, shape[1], activation="silu", training=False)


@by_layout
def test_large_means_do_not_hurt_the_variance(layout):
    # A naive sum of squares in float32 is wrong by more than the variance; the second case begins with an outlier.
    for outlier in (False, True):
        arguments, dy = tensors((6, 20, 31, 33), torch.float32, layout)
        arguments["x"] = arguments["x"] / 2 + 1e4
        if outlier:
            arguments["x"][0, :, 0, 0] = 0.0
        ours = run(batch_norm_act, arguments, dy)
        truth = run(batch_norm_act_reference, doubled(arguments), dy.double())
        for name in ("running_mean", "running_var", "y", "dweight"):
            active = slice(None) if name == "y" else slice(0, 20)
            value, exact = ours[name][active].double(), truth[name][active]
            assert (value - exact).abs().max() <= 1e-5 * exact.abs().max(), name


def test_parameters_in_bfloat16():
    arguments, dy = tensors((4, 9, 5, 5), torch.bfloat16)
    for name in ("weight", "bias", "running_mean", "running_var"):
        arguments[name] = arguments[name].bfloat16()
    check(arguments, dy, 9, activation="relu")


@by_dtype
@by_layout
def test_results_do_not_depend_on_threads_and_repeat_bit_for_bit(dtype, layout):
    arguments, dy = tensors((7, 20, 40, 30), dtype, layout, residual=True)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(run(batch_norm_act, arguments, dy, activation="silu"))
    for name, first in results[0].items():
        for other in results[1:]:
            assert torch.equal(torch.nan_to_num(first), torch.nan_to_num(other[name])), name


@by_layout
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradcheck(layout, training):
    for activation in ACTIVATIONS:
        for residual in (False, True):
            arguments, _ = tensors((4, 3, 2, 3), torch.float64, layout, full=3, residual=residual)
            leaves = [arguments[k].requires_grad_() for k in ("x", "weight", "bias")]
            if residual:
                leaves.append(arguments["residual"].requires_grad_())

            def call(x, weight, bias, *rest, arguments=arguments, activation=activation):
                running = arguments["running_mean"].clone(), arguments["running_var"].clone()
                rest = rest[0] if rest else None
                return batch_norm_act(
                    x, weight, bias, *running, training=training, activation=activation, residual=rest
                )

            assert torch.autograd.gradcheck(call, leaves)


def test_without_affine_and_without_running_statistics():
    arguments, dy = tensors((5, 6, 4, 4), torch.float32)
    arguments |= {"weight": None, "bias": None, "running_mean": None, "running_var": None}
    for training in (True, False):  # batch statistics in both
        check(arguments, dy, 6, training=training, activation="relu6")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_not_hidden_by_the_activation(activation):
    for layout in LAYOUTS:
        arguments, _ = tensors((4, 20, 5, 3), torch.float32, layout, full=20)
        arguments["x"][0, 0, 0, 0] = float("nan")
        y = batch_norm_act(**arguments, training=False, activation=activation)
        assert y[0, 0, 0, 0].isnan() and y.isnan().sum() == 1


def test_extreme_values_stay_finite_in_silu():
    x = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4]).repeat(8, 1).requires_grad_()
    ones, zeros = torch.ones(7), torch.zeros(7)
    y = batch_norm_act(x, None, None, zeros, ones, training=False, eps=0.0, activation="silu")
    y.sum().backward()
    reference = x.detach().double().requires_grad_()
    F.silu(reference).sum().backward()
    torch.testing.assert_close(y.double(), F.silu(reference), rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(x.grad.double(), reference.grad, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_narrower_instruction_sets_are_as_exact(isa):
    script = (
        "import torch, batch_norm_act_cases as t\n"
        "torch.set_num_threads(1)\n"
        "for layout in t.LAYOUTS:\n"
        "    for dtype in (torch.float32, torch.bfloat16, torch.float64):\n"
        "        for shape in t.SHAPES:\n"
        "            for activation, residual in (('relu', False), ('silu', True)):\n"
        "                arguments, dy = t.tensors(shape, dtype, layout, residual=residual)\n"
        "                t.check(arguments, dy, shape[1], activation=activation)\n"
    )
    environment = os.environ | {"FASTSLIM_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
