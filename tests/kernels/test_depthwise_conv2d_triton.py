"""depthwise_conv2d's Triton kernels: the public op in the interpreter, and on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastslim.ops import backend, depthwise_conv2d, use_backend
from fastslim.ops.step_buffers import StepBuffers

interpreted = pytest.mark.skipif(not backend.interpreting(), reason="Triton's interpreter is off")
# channels, size, kernel, stride, padding, batch, segments
CASES = {
    "3x3": (24, (5, 6), 3, 1, 1, 2, None),
    "3x3 stride 2": (9, (7, 6), 3, 2, 1, 2, None),
    "3x3 wide padding": (8, (3, 4), 3, 1, 3, 1, None),
    "3x3 two channel blocks": (70, (2, 3), 3, 1, 1, 1, None),
    "3x3 segments": (16, (4, 4), 3, 2, 0, 2, ((0, 10), (13, 6))),
    "5x5": (7, (6, 5), 5, 1, 2, 1, None),
    "5x5 stride 2": (8, (6, 7), 5, 2, 2, 1, None),
    "7x7 stride 2": (8, (5, 9), 7, 2, 3, 1, None),
    "7x7 smaller than the kernel": (8, (2, 3), 7, 1, 3, 1, None),
    "batch 0": (8, (4, 4), 3, 1, 1, 0, None),
}
SPARE = 3  # channels of the full layer behind the last active one


def operands(name: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor, dict]:
    """x, weight and bias (NaN outside the active rows), the output's gradient, the call's options."""
    channels, size, kernel, stride, padding, batch, segments = CASES[name]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    rows = [row for start, count in segments or ((0, channels),) for row in range(start, start + count)]
    full = rows[-1] + SPARE
    weight = torch.full((full, 1, kernel, kernel), torch.nan, dtype=dtype, device=device)
    bias = torch.full((full,), torch.nan, dtype=dtype, device=device)
    weight[rows], bias[rows] = random(channels, 1, kernel, kernel), random(channels)
    x = random(batch, channels, *size).contiguous(memory_format=torch.channels_last)
    options = {"stride": stride, "padding": padding, "segments": segments}
    out = [(size[i] + 2 * padding - kernel) // stride + 1 for i in (0, 1)]
    grad = random(batch, channels, *out).contiguous(memory_format=torch.channels_last)
    return [x, weight, bias], grad, {**options, "rows": rows}


def library(operands: list[Tensor], grad: Tensor, options: dict, dtype: torch.dtype) -> list[Tensor]:
    """Torch's output and gradients, of the active rows, in `dtype`."""
    x, weight, bias = (t.to(dtype) for t in operands)
    leaves = [t.detach().requires_grad_() for t in (x, weight[options["rows"]], bias[options["rows"]])]
    y = F.conv2d(*leaves, options["stride"], options["padding"], groups=x.shape[1])
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))]


def check(name: str, dtype: torch.dtype, device: str, forced: str) -> list[Tensor]:
    """Forward and backward of the public op under one backend: at most twice as wrong as torch."""
    (x, weight, bias), grad, options = operands(name, dtype, device)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    call = {key: value for key, value in options.items() if key != "rows"}
    with use_backend(forced):
        y = depthwise_conv2d(*leaves, **call)
        gradients = torch.autograd.grad(y, leaves, grad)
    ours = [y.detach(), gradients[0], *(gradient[options["rows"]] for gradient in gradients[1:])]
    truth, torchs = (library([x, weight, bias], grad, options, d) for d in (torch.float64, dtype))
    for mine, exact, other in zip(ours, truth, torchs, strict=True):
        assert mine.dtype == dtype and mine.shape == exact.shape
        if mine.numel():
            tiny = 4 * torch.finfo(dtype).eps * exact.abs().max()
            assert (mine.double() - exact).abs().max() <= 2 * (other.double() - exact).abs().max() + tiny
    return [y.detach(), *gradients]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_op_in_the_interpreter_agrees_with_torch(name, dtype):
    check(name, dtype, "cpu", "triton")


@interpreted
def test_repeats_are_bitwise_equal():
    first, second = (check("3x3 stride 2", torch.float32, "cpu", "triton") for _ in range(2))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))


@interpreted
def test_passes_add_up_in_the_steps_buffer():
    (x, weight, bias), grad, options = operands("3x3 segments", torch.float32, "cpu")
    weight, bias = (torch.nn.Parameter(t.nan_to_num()) for t in (weight, bias))
    buffers = StepBuffers([weight, bias])
    buffers.begin()
    with buffers.active(), use_backend("triton"):
        for _ in range(2):
            y = depthwise_conv2d(x, weight, bias, stride=2, padding=0, segments=options["segments"])
            y.backward(grad)
    buffers.finish()
    _, _, of_weight, of_bias = library([x, weight, bias], grad, options, torch.float64)
    inactive = [row for row in range(len(bias)) if row not in options["rows"]]
    for parameter, exact in ((weight, of_weight), (bias, of_bias)):
        torch.testing.assert_close(parameter.grad[options["rows"]].double(), 2 * exact, rtol=1e-5, atol=1e-5)
        assert not parameter.grad[inactive].any()


def test_calls_it_cannot_compute_are_refused():
    for options, why in (({"dilation": (2, 2)}, "no dilation"), ({"channels_last": False}, "channels_last")):
        call = {"direction": "forward", "channels_last": True, "dilation": (1, 1), **options}
        arguments = call["direction"], call["channels_last"], (3, 3), (1, 1), call["dilation"]
        with use_backend("triton"):
            choice = backend.choose("depthwise_conv2d", "sm_90", torch.bfloat16, *arguments)
        assert choice.backend != "triton" and (why in choice.reason or "cuda" in choice.reason)


# MobileNetV2's depthwise layers and odd widths: channels, stride, pixels.
GPU_SHAPES = [(32, 1, 112), (96, 2, 112), (144, 1, 56), (144, 2, 56), (192, 2, 28), (384, 1, 14), (576, 2, 14)]
GPU_SHAPES += [(960, 1, 7), (8, 1, 28), (24, 1, 28), (40, 2, 28), (72, 1, 14), (120, 1, 14), (200, 2, 14), (37, 1, 14)]


@pytest.mark.gpu
@pytest.mark.parametrize("forced", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("channels", "stride", "pixels"), GPU_SHAPES)
def test_benchmark_shapes_on_the_gpu_agree_with_torch(channels, stride, pixels, dtype, forced, monkeypatch):
    if reason := backend.unusable(forced, "sm_90"):
        pytest.skip(reason)
    monkeypatch.setitem(CASES, "shape", (channels, (pixels, pixels), 3, stride, 1, 2, None))
    check("shape", dtype, "cuda", forced)
