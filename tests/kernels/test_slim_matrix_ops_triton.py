"""slim_linear and slim_conv2d, forced to Triton, against float64: in the interpreter, and on a GPU if there is one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from cases import assert_as_exact_as_torch, poison
from matmul_cases import assert_close

from fastslim.ops import backend, slim_conv2d, slim_linear, use_backend
from fastslim.ops.slim_conv2d_library import ConvShape
from fastslim.ops.slim_conv2d_triton import slim_conv2d_bn_reference
from fastslim.ops.slim_linear_triton import slim_linear_bn_reference
from fastslim.ops.step_buffers import StepBuffers

interpreted = pytest.mark.skipif(not backend.interpreting(), reason="Triton's interpreter is off")
OPS = torch.ops.fastslim
# c_out of C_out, c_in of C_in, kernel, stride, padding, segments
CONVS = {
    "3x3-stride2": (19, 24, 13, 16, 3, 2, 1, None),
    "1x1": (7, 16, 33, 40, 1, 1, 0, None),
    "1x1-full": (8, 8, 16, 16, 1, 1, 0, None),
    "3x3-concat": (9, 12, 11, 32, 3, 1, 1, ((0, 5), (16, 6))),
    "1x1-concat": (9, 12, 11, 32, 1, 1, 0, ((0, 5), (16, 6))),
}


def conv_tensors(case, dtype, device="cpu", batch=2, pixels=5):
    c_out, full_out, c_in, full_in, k, stride, padding, segments = case
    torch.manual_seed(0)
    columns = torch.arange(c_in)
    if segments is not None:
        columns = torch.cat([torch.arange(start, start + count) for start, count in segments])
    x = torch.randn(batch, c_in, pixels, pixels).to(device, dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.full((full_out, full_in, k, k), float("nan"))
    weight[:c_out, columns] = torch.randn(c_out, c_in, k, k)
    weight = weight.to(device, dtype).contiguous(memory_format=torch.channels_last)
    bias = poison(torch.randn(full_out), slice(c_out)).to(device, dtype)
    return (x, weight, bias), columns, dict(stride=stride, padding=padding)


def differentiated(fn, tensors, upstream=None):
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    y = fn(*leaves)
    if upstream is None:
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(upstream.to(y))
    return [y.detach(), *(leaf.grad for leaf in leaves)], upstream


def conv_is_as_exact_as_torch(case, dtype, device, **sizes) -> None:
    c_out, segments = case[0], case[7]
    tensors, columns, settings = conv_tensors(case, dtype, device, **sizes)

    def plain(x, w, b):
        return F.conv2d(x, w[:c_out, columns.to(device)], b[:c_out], **settings)

    def ours(x, w, b):
        with use_backend("triton"):
            return slim_conv2d(x, w, b, **settings, c_out=c_out, segments=segments)

    with use_backend("triton"):
        mine, upstream = differentiated(ours, tensors)
    torchs, _ = differentiated(plain, tensors, upstream)
    true, _ = differentiated(plain, [t.double() for t in tensors], upstream)
    mine[2], torchs[2], true[2] = (t.nan_to_num() for t in (mine[2], torchs[2], true[2]))
    for found in zip(mine, torchs, true, strict=True):
        assert_as_exact_as_torch(*found)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CONVS.values(), ids=CONVS)
def test_convolution_and_gradients_are_as_exact_as_torch(case, dtype) -> None:
    conv_is_as_exact_as_torch(case, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        *CONVS.values(),
        (64, 64, 64, 64, 3, 1, 1, None),
        (96, 128, 64, 128, 3, 2, 1, None),
        (192, 256, 40, 64, 1, 1, 0, None),
        (384, 512, 128, 256, 1, 2, 0, None),
        (64, 64, 3, 3, 7, 2, 3, None),
    ],
    ids=str,
)
def test_convolution_on_a_gpu_is_as_exact_as_torch(case, dtype) -> None:
    conv_is_as_exact_as_torch(case, dtype, "cuda", batch=4, pixels=14)


def linear_is_as_exact_as_torch(dtype, device, rows, c_in, c_out) -> None:
    torch.manual_seed(0)
    weight = poison(torch.randn(c_out + 4, c_in + 8), slice(c_out), slice(c_in))
    bias = poison(torch.randn(c_out + 4), slice(c_out))
    tensors = [t.to(device, dtype) for t in (torch.randn(3, rows, c_in), weight, bias)]

    def ours(x, w, b):
        return slim_linear(x, w, b, c_out=c_out)

    def plain(x, w, b):
        return F.linear(x, w[:c_out, :c_in], b[:c_out])

    with use_backend("triton"):
        mine, upstream = differentiated(ours, tensors)
    torchs, _ = differentiated(plain, tensors, upstream)
    true, _ = differentiated(plain, [t.double() for t in tensors], upstream)
    for found in zip(mine, torchs, true, strict=True):
        assert_as_exact_as_torch(*found)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(21, 65, 7), (1, 3, 1), (50, 24, 40)], ids=str)
def test_linear_and_gradients_are_as_exact_as_torch(size, dtype) -> None:
    linear_is_as_exact_as_torch(dtype, "cpu", *size)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(21, 65, 7), (64, 2048, 1000), (4096, 512, 384), (20000, 256, 512)], ids=str)
def test_linear_on_a_gpu_is_as_exact_as_torch(size, dtype) -> None:
    linear_is_as_exact_as_torch(dtype, "cuda", *size)


@interpreted
@pytest.mark.parametrize("case", [CONVS["3x3-stride2"], CONVS["1x1-concat"]], ids=["3x3", "1x1-concat"])
def test_in_a_step_gradients_are_added_to_the_prefix_and_nothing_else_is_touched(case) -> None:
    c_out, segments = case[0], case[7]
    (x, weight, bias), columns, settings = conv_tensors(case, torch.float32)
    weight, bias = weight.nan_to_num().requires_grad_(), bias.nan_to_num().requires_grad_()
    true = torch.autograd.grad(
        F.conv2d(x.double(), weight[:c_out, columns].double(), **settings).sum(), weight, retain_graph=True
    )[0]
    before = [torch.randn_like(p) for p in (weight, bias)]
    weight.grad, bias.grad = (b.clone(memory_format=torch.preserve_format) for b in before)
    buffers = StepBuffers([weight, bias])
    buffers.begin(accumulate=True)
    with buffers.active(), use_backend("triton"):
        for _ in range(2):
            slim_conv2d(x, weight, bias, **settings, c_out=c_out, segments=segments).sum().backward()
    buffers.finish()
    assert_close(weight.grad, before[0].double() + 2 * true, 200)
    outside = torch.ones_like(weight, dtype=torch.bool)
    outside[:c_out, columns] = False
    assert torch.equal(weight.grad[outside], before[0][outside])


@interpreted
def test_forced_triton_computes_every_direction(monkeypatch) -> None:
    calls = []
    choose = backend.choose
    backend.forget()  # a convolution remembers what other tests have asked
    monkeypatch.setattr(backend, "choose", lambda *call: calls.append(choose(*call).backend) or choose(*call))
    conv_is_as_exact_as_torch(CONVS["1x1-full"], torch.float32, "cpu")
    linear_is_as_exact_as_torch(torch.float32, "cpu", 3, 4, 5)
    assert len(calls) == 6  # three directions of each
    assert set(calls) == {"triton"}


@interpreted
def test_autocast_reads_the_steps_cast_and_adds_to_float32_gradients() -> None:
    x, weight = torch.randn(40, 24), torch.randn(16, 32, requires_grad=True)
    buffers = StepBuffers([weight])
    buffers.begin()
    with buffers.active(), use_backend("triton"), torch.autocast("cpu", torch.float16):
        y = slim_linear(x, weight, c_out=8)
        y.backward(torch.ones_like(y))
    buffers.finish()
    assert y.dtype == torch.float16
    assert_close(y.detach(), x.half().double() @ weight[:8, :24].detach().half().double().t(), 24)
    assert_close(weight.grad[:8, :24], x.half().double().sum(0).expand(8, 24), 40)
    assert not weight.grad[8:].any()


@interpreted
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_directions_may_be_computed_by_different_backends(layout, monkeypatch) -> None:
    (x, weight, bias), columns, settings = conv_tensors(CONVS["3x3-concat"], torch.float32)
    x, weight, bias = x.contiguous(memory_format=layout), weight.nan_to_num(), bias.nan_to_num()
    results = []
    for forward in (None, "triton"):
        for backward in (None, "triton"):
            leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight)]
            with use_backend(forward):
                y = slim_conv2d(*leaves, bias, **settings, c_out=9, segments=CONVS["3x3-concat"][7])
            with use_backend(backward):
                y.square().sum().backward()
            results.append([y.detach(), *(leaf.grad for leaf in leaves)])
            assert y.is_contiguous(memory_format=layout)
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-4, atol=1e-3)


@interpreted
@pytest.mark.parametrize("segments", [[], [0, 5, 9, 8]], ids=["prefix", "segments"])
def test_fused_linear_equals_its_definition(segments) -> None:
    x, weight, bias = torch.randn(150, 13).half(), torch.randn(12, 20).half(), torch.randn(12).half()
    prologue, pairs = torch.randn(3, 13), tuple(zip(segments[::2], segments[1::2], strict=True)) or None
    call = (x, weight, bias, 9, segments, prologue, 2)
    y, stats = OPS.slim_linear_bn_triton(*call)
    y_true, _ = slim_linear_bn_reference(x, weight, bias, 9, pairs, prologue, 2)
    torch.testing.assert_close(y, y_true, rtol=2e-3, atol=4e-3)
    assert stats.shape == (2, 3, 9)
    torch.testing.assert_close(stats[:, 0], y[[0, 128]].float(), rtol=0, atol=0)
    torch.testing.assert_close(stats[0, 1] + 128 * stats[0, 0], y[:128].float().sum(0), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(stats[1, 2], (y[128:].float() - y[128].float()).square().sum(0), rtol=1e-4, atol=1e-4)
    torch.library.opcheck(OPS.slim_linear_bn_triton, (x[:3], *call[1:]))


@interpreted
@pytest.mark.parametrize(("kernel", "segments"), [(1, []), (3, [0, 3, 5, 4])], ids=str)
def test_fused_convolution_equals_its_definition(kernel, segments) -> None:
    x = torch.randn(2, 7, 9, 8).contiguous(memory_format=torch.channels_last)
    weight, prologue = torch.randn(6, 10, kernel, kernel), torch.randn(3, 7)
    pairs = tuple(zip(segments[::2], segments[1::2], strict=True)) or None
    conv = ((1, 1), (kernel // 2, kernel // 2), (1, 1))
    call = (x, weight, None, *conv, 5, segments, prologue, 1)
    found = OPS.slim_conv2d_bn_triton(*call)
    expected = slim_conv2d_bn_reference(x, weight, None, ConvShape(*conv, 1, 5, pairs), prologue, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    torch.library.opcheck(OPS.slim_conv2d_bn_triton, (x[:1, :, :2, :2], *call[1:]))


@interpreted
def test_opcheck_of_the_plain_ops() -> None:
    x, weight, dy = torch.randn(9, 6), torch.randn(8, 10), torch.randn(9, 5)
    torch.library.opcheck(OPS.slim_linear_triton, (x, weight, None, 5, []))
    torch.library.opcheck(OPS.slim_linear_backward_input_triton, (dy, weight, 6, [], x, 1))
    torch.library.opcheck(OPS.slim_linear_backward_weight_triton, (dy, x, torch.zeros(8, 10), [], True, None, 0))
    x, weight, dy = torch.randn(1, 6, 2, 2), torch.randn(8, 10, 3, 3), torch.randn(1, 5, 2, 2)
    conv = ((1, 1), (1, 1), (1, 1), 5, [])
    torch.library.opcheck(OPS.slim_conv2d_triton, (x, weight, None, *conv))
    torch.library.opcheck(OPS.slim_conv2d_backward_input_triton, (dy, weight, x.shape, *conv, x, 2))
    gradient = torch.zeros(8, 10, 3, 3)
    torch.library.opcheck(OPS.slim_conv2d_backward_weight_triton, (dy, x, gradient, *conv, False, None, 0))


@interpreted
@pytest.mark.parametrize("kernel", [1, 3])
def test_empty_batch_gives_empty_output_and_zero_gradients(kernel) -> None:
    x = torch.randn(0, 4, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(8, 8, kernel, kernel, requires_grad=True)
    with use_backend("triton"):
        y = slim_conv2d(x, weight, padding=kernel // 2, c_out=6)
        y.sum().backward()
    assert y.shape == (0, 6, 5, 5)
    assert x.grad.shape == x.shape
    assert not weight.grad.any()
