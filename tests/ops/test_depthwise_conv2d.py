"""depthwise_conv2d against float64 on the weight's active rows, judged by torch's own error."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastslim.ops import backend
from fastslim.ops.depthwise_conv2d import depthwise_conv2d
from fastslim.ops.depthwise_conv2d_library import DepthwiseShape, depthwise_conv2d_reference
from fastslim.ops.step_buffers import StepBuffers

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
FORMATS = [torch.contiguous_format, torch.channels_last]


class Case(NamedTuple):
    """One convolution: active channels, image, kernel and what is not the default."""

    channels: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    batch: int = 2
    full: int = 0  # channels of the full layer; 0: three more than active
    segments: tuple[tuple[int, int], ...] | None = None
    bias: bool = False

    def conv(self) -> dict:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "segments": self.segments,
            "multiplier": self.multiplier,
        }


CASES = {
    "stride 1": Case(24, (9, 13)),
    "stride 2 odd": Case(40, (13, 11), stride=(2, 2)),
    "stride 2 even": Case(72, (12, 14), stride=(2, 2), bias=True),
    "5x5": Case(17, (9, 10), (5, 5), padding=(2, 2)),
    "5x5 stride 2": Case(33, (11, 9), (5, 5), (2, 2), (2, 2)),
    "7x7": Case(16, (9, 9), (7, 7), padding=(3, 3), bias=True),
    "7x7 stride 2": Case(20, (15, 9), (7, 7), (2, 2), (3, 3)),
    "one channel": Case(1, (7, 9), bias=True),
    "five channels": Case(5, (7, 9), stride=(2, 2)),
    "63 channels": Case(63, (5, 6)),
    "one pixel": Case(24, (1, 1), bias=True),
    "kernel larger than the input": Case(24, (2, 2), (5, 5), padding=(2, 2)),
    "no padding": Case(24, (8, 7), padding=(0, 0)),
    "more padding than kernel": Case(24, (4, 5), padding=(4, 5)),
    "even kernel": Case(18, (7, 8), (2, 4), (2, 1), (1, 2)),
    "1x1": Case(18, (5, 6), (1, 1), padding=(0, 0)),
    "stride beyond kernel": Case(18, (11, 13), (2, 2), (3, 4), (0, 1)),
    "dilation": Case(24, (11, 12), dilation=(2, 3), padding=(2, 3)),
    "dilation and stride": Case(24, (11, 12), (3, 3), (2, 2), (2, 3), (3, 2)),
    "tall dilation only": Case(24, (11, 12), padding=(2, 1), dilation=(2, 1), stride=(2, 1)),
    "multiplier 2": Case(12, (7, 8), multiplier=2, stride=(2, 2), bias=True),
    "multiplier 3": Case(7, (6, 6), (5, 3), multiplier=3),
    "segments": Case(24, (7, 8), full=40, segments=((2, 10), (20, 14)), bias=True),
    "segments, multiplier 2": Case(9, (7, 8), full=16, segments=((0, 4), (11, 5)), multiplier=2, bias=True),
    "whole layer": Case(24, (7, 8), full=24, bias=True),
    "batch 0": Case(24, (7, 8), batch=0, bias=True),
    "many rows": Case(17, (40, 40), batch=3, stride=(2, 2)),
    "wide": Case(3, (3, 150), (3, 5), padding=(1, 2)),
}


class Operands(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    grad: Tensor


def operands(case: Case, dtype: torch.dtype, memory_format: torch.memory_format, seed: int = 0) -> Operands:
    """Random operands; rows of weight and bias outside the active ones are NaN."""
    generator = torch.Generator().manual_seed(seed)
    m, full = case.multiplier, case.full or case.channels + 3
    x = torch.randn(case.batch, case.channels, *case.size, generator=generator, dtype=torch.float64)
    rows = torch.zeros(full * m, dtype=torch.bool)
    for start, count in case.segments or ((0, case.channels),):
        rows[start * m : (start + count) * m] = True
    weight = torch.randn(full * m, 1, *case.kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(full * m, generator=generator, dtype=torch.float64) if case.bias else None
    weight[~rows] = torch.nan
    if bias is not None:
        bias[~rows] = torch.nan
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    shape = reference(case, x, weight, bias).shape
    grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return Operands(
        x.contiguous(memory_format=memory_format), weight, bias, grad.contiguous(memory_format=memory_format)
    )


def reference(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    flat = tuple(value for segment in case.segments or () for value in segment)
    shape = DepthwiseShape(case.stride, case.padding, case.dilation, flat, case.multiplier)
    return depthwise_conv2d_reference(x, weight, bias, shape)


def results(function, o: Operands, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and gradients of x, weight and bias."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in o[:3] if t is not None]
    y = function(*leaves, *([None] if o.bias is None else []))
    gradients = torch.autograd.grad(y, leaves, o.grad.to(y.dtype))
    return [y.detach(), *gradients]


def assert_as_exact_as_torch(case: Case, o: Operands) -> None:
    ours = results(lambda x, w, b: depthwise_conv2d(x, w, b, **case.conv()), o)
    theirs = results(lambda x, w, b: reference(case, x, w, b), o)
    truth = results(lambda x, w, b: reference(case, x, w, b), o, torch.float64)
    for name, mine, torchs, exact in zip(("y", "x", "weight", "bias"), ours, theirs, truth, strict=False):
        assert mine.dtype == o.x.dtype and mine.shape == exact.shape
        if exact.numel() == 0:
            continue
        scale = exact.abs().max()
        # Units in the last place, where torch happens to be exact; in float64 it is the truth itself.
        tiny = scale * torch.finfo(mine.dtype).eps * (64 if mine.dtype == torch.float64 else 4)
        error, allowed = (mine.double() - exact).abs().max(), (torchs.double() - exact).abs().max()
        assert error <= 2 * allowed + tiny, f"{name}: error {error:.2e}, torch's {allowed:.2e}"


@pytest.fixture(autouse=True)
def _our_kernels_on_poisoned_memory():
    """Every direction through our kernels, into outputs that hold NaN before they are written; small: one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with backend.use_backend("cpp"):
        yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_forward_and_gradients_match_float64(case, dtype, memory_format):
    o = operands(case, dtype, memory_format)
    assert_as_exact_as_torch(case, o)
    y = depthwise_conv2d(o.x, o.weight, o.bias, **case.conv())
    assert y.is_contiguous(memory_format=memory_format) or y.numel() == 0


def _extents(least: int, most: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(least, most), st.integers(least, most))


@st.composite
def random_cases(draw) -> Case:
    kernel, dilation, padding = draw(_extents(1, 7)), draw(_extents(1, 3)), draw(_extents(0, 4))
    size = tuple(max(draw(st.integers(1, 14)), dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in (0, 1))
    first, gap, second = draw(st.integers(0, 20)), draw(st.integers(1, 3)), draw(st.integers(1, 20))
    segments = ((0, first), (first + gap, second)) if draw(st.booleans()) else None
    return Case(
        first + second,
        size,
        kernel,
        draw(_extents(1, 3)),
        padding,
        dilation,
        draw(st.sampled_from((1, 1, 1, 2))),
        draw(st.integers(1, 3)),
        first + second + gap,
        segments,
        draw(st.booleans()),
    )


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(random_cases(), st.sampled_from(DTYPES), st.sampled_from(FORMATS), st.integers(0, 1000))
def test_random_shapes_match_float64(case, dtype, memory_format, seed):
    assert_as_exact_as_torch(case, operands(case, dtype, memory_format, seed))


@pytest.mark.parametrize("forced", ["library", "reference"])
def test_other_backends_agree(forced):
    for name in ("stride 2 odd", "segments, multiplier 2", "whole layer"):
        with backend.use_backend(forced):
            assert_as_exact_as_torch(CASES[name], operands(CASES[name], torch.float32, torch.channels_last))


@pytest.mark.parametrize("memory_format", FORMATS, ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("name", ["stride 2 odd", "dilation and stride", "segments, multiplier 2"])
def test_gradcheck(name, memory_format):
    case = CASES[name]._replace(channels=9, batch=1) if name != "segments, multiplier 2" else CASES[name]
    o = operands(case, torch.float64, memory_format)
    weight = o.weight.nan_to_num()
    leaves = [t.requires_grad_() for t in (o.x, weight)]
    assert torch.autograd.gradcheck(lambda x, w: depthwise_conv2d(x, w, None, **case.conv()), leaves, fast_mode=True)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, memory_format):
    case = CASES["segments, multiplier 2"]
    o = operands(case, dtype, memory_format)
    x, weight, bias, grad = o.x, o.weight.nan_to_num(), o.bias.nan_to_num(), o.grad
    conv = (case.stride, case.padding, case.dilation, [0, 4, 11, 5], case.multiplier)
    ops = torch.ops.fastslim
    for needs in (False, True):
        arguments = [t.clone().requires_grad_(needs) for t in (x, weight, bias)]
        torch.library.opcheck(ops.depthwise_conv2d.default, (*arguments, *conv))
    channels_last = memory_format is torch.channels_last
    torch.library.opcheck(ops.depthwise_conv2d_backward_input.default, (grad, weight, x.shape, channels_last, *conv))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for grad_bias in (None, torch.zeros_like(bias, dtype=wide)):
        torch.library.opcheck(
            ops.depthwise_conv2d_backward_weight.default,
            (grad, x, torch.zeros_like(weight, dtype=wide), grad_bias, *conv, True, True),
        )


def test_compiles_without_a_graph_break():
    case = CASES["stride 2 even"]
    o = operands(case, torch.float32, torch.channels_last)
    compiled = torch.compile(
        lambda x, w, b: depthwise_conv2d(x, w, b, **case.conv()), fullgraph=True, backend="aot_eager"
    )
    for mine, eager in zip(
        results(compiled, o), results(lambda *t: depthwise_conv2d(*t, **case.conv()), o), strict=True
    ):
        torch.testing.assert_close(mine, eager)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_bitwise_equal_for_any_thread_count_and_repeat(dtype, memory_format):
    case = Case(40, (33, 35), stride=(2, 2), batch=7, bias=True)
    o = operands(case, dtype, memory_format)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            runs.append(results(lambda *t: depthwise_conv2d(*t, **case.conv()), o))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(a.equal(b) for a, b in zip(run, runs[0], strict=True))


def test_weight_is_read_through_its_strides():
    case = CASES["5x5 stride 2"]
    o = operands(case, torch.float32, torch.channels_last)
    expected = depthwise_conv2d(o.x, o.weight, None, **case.conv())
    spread = torch.full((*o.weight.shape, 2), torch.nan)
    spread[..., 0] = o.weight
    transposed = o.weight.transpose(2, 3).contiguous().transpose(2, 3)
    for weight in (spread[..., 0], transposed, o.weight.contiguous(memory_format=torch.channels_last)):
        assert depthwise_conv2d(o.x, weight, None, **case.conv()).equal(expected)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["NCHW", "channels_last"])
def test_input_may_be_a_slice_and_the_gradient_expanded(memory_format):
    case = CASES["stride 1"]
    o = operands(case, torch.float32, memory_format)
    wide = torch.cat([o.x, o.x], 1).contiguous(memory_format=memory_format)[:, :24].detach().requires_grad_()
    dense = o.x.detach().requires_grad_()
    ys = [depthwise_conv2d(x, o.weight, None, **case.conv()) for x in (wide, dense)]
    assert ys[0].equal(ys[1])
    for y in ys:
        y.sum().backward()  # its gradient has stride 0
    assert wide.grad.equal(dense.grad)


class TestGradientSlot:
    """Inside a step, gradients go into the active rows of the flat buffer and nowhere else."""

    @pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("forced", ["cpp", "library"])
    @pytest.mark.parametrize("name", ["whole layer", "stride 2 even", "segments, multiplier 2"])
    def test_passes_add_up_as_with_plain_autograd(self, name, forced, compute):
        case = CASES[name]
        o = operands(case, torch.float32, torch.channels_last)
        weight, bias = (torch.nn.Parameter(t.nan_to_num()) for t in (o.weight, o.bias))

        def run_pass():
            with torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16), backend.use_backend(forced):
                y = depthwise_conv2d(o.x, weight, bias, **case.conv())
            y.backward(o.grad.to(y.dtype))

        buffers = StepBuffers([weight, bias])
        for _ in range(2):  # the second step must not see the first
            buffers.begin()
            with buffers.active():
                run_pass()
                run_pass()
            buffers.finish()
        inside = [weight.grad.clone(), bias.grad.clone()]
        weight.grad = bias.grad = None
        run_pass()
        for mine, plain in zip(inside, (weight.grad, bias.grad), strict=True):
            torch.testing.assert_close(mine, 2 * plain, rtol=1e-5, atol=1e-5)

    def test_bytes_outside_the_active_rows_are_untouched(self):
        case = CASES["segments, multiplier 2"]
        o = operands(case, torch.float32, torch.channels_last)
        weight, bias = (torch.nn.Parameter(t.nan_to_num()) for t in (o.weight, o.bias))
        buffers = StepBuffers([weight, bias])
        weight.grad, bias.grad = torch.randn_like(weight), torch.randn_like(bias)
        before = [weight.grad.clone(), bias.grad.clone()]
        buffers.begin(accumulate=True)
        with buffers.active():
            depthwise_conv2d(o.x, weight, bias, **case.conv()).backward(o.grad)
        buffers.finish()
        outside = o.bias.isnan()
        assert outside.sum() == 14
        for after, was in zip((weight.grad, bias.grad), before, strict=True):
            assert after[outside].equal(was[outside])
            assert not after[~outside].isclose(was[~outside]).all()

    def test_frozen_weight_with_trained_bias(self):
        case = CASES["stride 2 even"]
        o = operands(case, torch.float32, torch.channels_last)
        bias = o.bias.clone().requires_grad_()
        depthwise_conv2d(o.x, o.weight, bias, **case.conv()).backward(o.grad)
        torch.testing.assert_close(bias.grad[:72], o.grad.sum((0, 2, 3)))
        assert not bias.grad[72:].any()


def test_autocast_gives_float32_gradients_of_bfloat16_operands():
    case = CASES["stride 1"]
    o = operands(case, torch.float32, torch.channels_last)
    weight = o.weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise_conv2d(o.x, weight, None, **case.conv())
    y.backward(o.grad.bfloat16())
    assert y.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    x, grad = o.x.bfloat16().double(), o.grad.bfloat16().double()
    exact = torch.nn.grad.conv2d_weight(x, (24, 1, 3, 3), grad, padding=1, groups=24)
    # Far below bfloat16's resolution (8e-3): nothing was rounded on the way.
    torch.testing.assert_close(weight.grad[:24].double(), exact, rtol=1e-5, atol=1e-5)
