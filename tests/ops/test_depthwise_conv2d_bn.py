"""depthwise_conv2d_bn: its definition against separate ops in float64, and Triton's kernels against that."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastslim.ops import backend, depthwise_conv2d_bn, depthwise_conv2d_bn_backward_weight, use_backend
from fastslim.ops.depthwise_conv2d_library import DepthwiseShape
from fastslim.ops.depthwise_conv2d_schema import statistics_chunks

ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6}
CASES = {
    "3x3": (16, (5, 6), 3, 1, 1, 2, ()),
    "3x3 stride 2": (7, (6, 7), 3, 2, 1, 2, ()),
    "segments": (12, (4, 4), 3, 1, 1, 1, (0, 4, 7, 8)),
    "5x5 stride 2": (8, (6, 5), 5, 2, 2, 1, ()),
    "batch 0": (8, (4, 4), 3, 1, 1, 0, ()),
}
BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not backend.interpreting(), reason="no GPU"))]


class Call(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    prologue: Tensor
    grad: Tensor
    rows: list[int]
    conv: DepthwiseShape


def make_call(name: str, dtype: torch.dtype, device: str = "cpu") -> Call:
    """Operands, NaN in the rows that are not active."""
    channels, size, kernel, stride, padding, batch, segments = CASES[name]
    torch.manual_seed(0)
    pairs = list(zip(segments[::2], segments[1::2], strict=True)) or [(0, channels)]
    rows = [row for start, count in pairs for row in range(start, start + count)]
    weight = torch.full((rows[-1] + 3, 1, kernel, kernel), torch.nan, device=device, dtype=dtype)
    bias = torch.full((rows[-1] + 3,), torch.nan, device=device, dtype=dtype)
    weight[rows] = torch.randn(channels, 1, kernel, kernel, device=device).to(dtype)
    bias[rows] = torch.randn(channels, device=device).to(dtype)
    x = torch.randn(batch, channels, *size, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    prologue = torch.randn(3, channels, device=device, dtype=torch.promote_types(dtype, torch.float32))
    out = [(size[i] + 2 * padding - kernel) // stride + 1 for i in (0, 1)]
    grad = torch.randn(batch, channels, *out, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    conv = DepthwiseShape((stride, stride), (padding, padding), (1, 1), segments, 1)
    return Call(x, weight, bias, prologue, grad, rows, conv)


def separately(call: Call, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Output, weight and bias gradient of the active rows, by torch's separate ops in float64."""
    center, scale, shift = call.prologue.double()[:, :, None, None]
    normal = ACTIVATIONS[activation]((call.x.double() - center) * scale + shift)
    weight, bias = (t[call.rows].double().requires_grad_() for t in (call.weight, call.bias))
    y = F.conv2d(normal, weight, bias, call.conv.stride, call.conv.padding, groups=call.x.shape[1])
    return y.detach(), *torch.autograd.grad(y, (weight, bias), call.grad.double())


@pytest.mark.parametrize("forced", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_separate_ops(name, activation, forced):
    check(make_call(name, torch.float32), activation, forced)


def check(call: Call, activation: str, forced: str) -> None:
    """One backend against separate ops: as exact as float32 sums, rounded once to the output's dtype."""
    index = list(ACTIVATIONS).index(activation)
    y_exact, weight_exact, bias_exact = separately(call, activation)
    before = torch.randn_like(call.weight, dtype=torch.float32), torch.randn_like(call.bias, dtype=torch.float32)
    grad_weight, grad_bias = before[0].clone(), before[1].clone()
    with use_backend(forced):
        y, partials = depthwise_conv2d_bn(call.x, call.weight, call.bias, call.prologue, index, call.conv, True)
        depthwise_conv2d_bn_backward_weight(
            call.grad, call.x, grad_weight, grad_bias, call.prologue, index, call.conv, True, False
        )
    eps = torch.finfo(y.dtype).eps
    torch.testing.assert_close(y.double(), y_exact, rtol=eps, atol=2e-5)
    expected_weight, expected_bias = before[0].double(), before[1].double()
    expected_weight[call.rows] += weight_exact
    expected_bias[call.rows] = bias_exact
    torch.testing.assert_close(grad_weight.double(), expected_weight, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grad_bias.double(), expected_bias, rtol=1e-5, atol=1e-4)
    chunks = statistics_chunks(y.shape[0] * y.shape[2], y.shape[1])
    assert partials.shape == (chunks.chunks, 3, y.shape[1])
    values = y.permute(0, 2, 3, 1).reshape(-1, y.shape[1]).split(chunks.rows * y.shape[3]) if chunks.chunks else ()
    for chunk, (first, total, squares) in zip(values, partials, strict=True):
        difference = chunk.double() - chunk[0].double()
        assert torch.equal(first, chunk[0].float())
        torch.testing.assert_close(total.double(), difference.sum(0), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(squares.double(), difference.square().sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("forced", BACKENDS)
def test_operands_with_gaps_between_their_pixels(forced):
    call = make_call("3x3", torch.float32)
    wide = torch.cat([call.x, torch.full_like(call.x, torch.nan)], dim=1).contiguous(memory_format=torch.channels_last)
    same_gradient = torch.ones(()).expand(call.grad.shape)
    check(call._replace(x=wide[:, :16], grad=same_gradient), "relu6", forced)


@pytest.mark.parametrize("forced", BACKENDS)
def test_without_statistics_and_prologue_it_is_the_convolution(forced):
    call = make_call("3x3", torch.float32)
    with use_backend(forced):
        y, partials = depthwise_conv2d_bn(call.x, call.weight, None, None, 0, call.conv, False)
    assert partials.shape == (0, 3, 16)
    exact = F.conv2d(call.x, call.weight[call.rows], None, 1, 1, groups=16)
    torch.testing.assert_close(y, exact)


@pytest.mark.parametrize("rows", [0, 1, 7, 448, 791, 792, 793, 3584, 7168])
@pytest.mark.parametrize("channels", [1, 144, 960, 300_000])
def test_every_chunk_but_the_last_has_the_same_rows(rows, channels):
    chunks = statistics_chunks(rows, channels)
    assert chunks.chunks <= 132 * 6
    assert (chunks.chunks - 1) * chunks.rows < rows <= chunks.chunks * chunks.rows or rows == chunks.chunks == 0
    assert not rows or chunks.rows == -(-rows // chunks.chunks)  # so the number of chunks tells their size


@pytest.mark.parametrize("suffix", ["", *(["_triton"] if backend.interpreting() else [])])
def test_opcheck(suffix):
    call = make_call("segments", torch.float32)
    weight, bias = call.weight.nan_to_num(), call.bias.nan_to_num()
    conv = (*call.conv[:3], list(call.conv.segments), 1)
    op = getattr(torch.ops.fastslim, f"depthwise_conv2d_bn{suffix}")
    torch.library.opcheck(op.default, (call.x, weight, bias, call.prologue, 1, *conv, True))
    op = getattr(torch.ops.fastslim, f"depthwise_conv2d_bn_backward_weight{suffix}")
    gradients = torch.zeros_like(weight), torch.zeros_like(bias)
    torch.library.opcheck(op.default, (call.grad, call.x, *gradients, call.prologue, 1, *conv, True, True))


@pytest.mark.gpu
@pytest.mark.parametrize("forced", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels_on_the_gpu_agree_with_separate_ops(name, dtype, forced):
    if reason := backend.unusable(forced, "sm_90"):
        pytest.skip(reason)
    check(make_call(name, dtype, "cuda"), "relu6", forced)
