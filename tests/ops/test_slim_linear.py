"""slim_linear against `F.linear` on the slice, judged in float64; in place, in every form of use."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, assert_as_exact_as_torch, poison

from fastslim import errors
from fastslim.ops import slim_linear, use_backend
from fastslim.ops.step_buffers import StepBuffers

SHAPES = {  # leading dimensions, c_in of C_in, c_out of C_out
    "rows": ((63,), 24, 32, 10, 16),
    "no-leading": ((), 24, 32, 10, 16),
    "three-leading": ((2, 3, 5), 17, 64, 1, 8),
    "full": ((1000,), 16, 16, 10, 10),
}


def run(fn, x, weight, bias, upstream=None):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = fn(*leaves)
    if upstream is None:
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(upstream.to(y))
    return y.detach(), [leaf.grad for leaf in leaves], upstream


def tensors(shape, dtype):
    leading, c_in, full_in, _, full_out = shape
    torch.manual_seed(0)
    return (t.to(dtype) for t in (torch.randn(*leading, c_in), torch.randn(full_out, full_in), torch.randn(full_out)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_gradients_are_as_exact_as_torch(shape, dtype) -> None:
    _, c_in, _, c_out, _ = shape
    x, weight, bias = tensors(shape, dtype)

    def plain(x, w, b):
        return F.linear(x, w[:c_out, :c_in], b[:c_out])

    y, grads, upstream = run(lambda x, w, b: slim_linear(x, w, b, c_out=c_out), x, weight, bias)
    y_torch, grads_torch, _ = run(plain, x, weight, bias, upstream)
    y_true, grads_true, _ = run(plain, x.double(), weight.double(), bias.double(), upstream)
    assert_as_exact_as_torch(y, y_torch, y_true)
    for mine, theirs, true in zip(grads, grads_torch, grads_true, strict=True):
        assert_as_exact_as_torch(mine, theirs, true)


def test_output_can_be_changed_in_place() -> None:
    x, weight, bias = tensors(SHAPES["three-leading"], torch.float32)
    changed, plain = (
        run(lambda x, w, b, f=f: f(slim_linear(x, w, b, c_out=1)), x, weight, bias, torch.ones(2, 3, 5, 1))
        for f in (torch.relu_, torch.relu)
    )
    assert all(map(torch.equal, (changed[0], *changed[1]), (plain[0], *plain[1])))


def test_weights_outside_the_prefix_are_never_read() -> None:
    x, weight, bias = tensors(SHAPES["rows"], torch.float32)
    weight, bias = poison(weight, slice(10), slice(24)), poison(bias, slice(10))
    y, grads, _ = run(lambda x, w, b: slim_linear(x, w, b, c_out=10), x, weight, bias)
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("segments", [None, ((0, 9), (16, 15))])
def test_in_a_step_gradients_are_added_to_the_prefix_and_nothing_else_is_touched(segments) -> None:
    x, weight, bias = (t.requires_grad_() for t in tensors(SHAPES["rows"], torch.float64))
    expected = torch.autograd.grad(slim_linear(x, weight, bias, c_out=10, segments=segments).sum(), (weight, bias))
    before = [torch.randn_like(p) for p in (weight, bias)]
    weight.grad, bias.grad = (b.clone() for b in before)
    buffers = StepBuffers([weight, bias])
    buffers.begin(accumulate=True)
    with buffers.active():
        slim_linear(x, weight, bias, c_out=10, segments=segments).sum().backward()
    buffers.finish()
    for p, old, new in zip((weight, bias), before, expected, strict=True):
        torch.testing.assert_close(p.grad, old + new, rtol=1e-12, atol=1e-12)
    assert torch.equal(weight.grad[10:], before[0][10:])
    assert torch.equal(bias.grad[10:], before[1][10:])


def test_segments_take_the_features_a_concat_gives() -> None:
    segments = ((0, 9), (16, 15))
    x, weight, bias = (t.requires_grad_() for t in tensors(SHAPES["rows"], torch.float64))
    columns = torch.cat([torch.arange(start, start + count) for start, count in segments])
    y = slim_linear(x, weight, bias, c_out=10, segments=segments)
    expected = F.linear(x, weight[:10, columns], bias[:10])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(y)
    for mine, theirs in zip(
        torch.autograd.grad(y, (x, weight, bias), upstream),
        torch.autograd.grad(expected, (x, weight, bias), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_empty_batch_gives_empty_output_and_zero_gradients() -> None:
    x, weight = torch.randn(0, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    slim_linear(x, weight, c_out=4).sum().backward()
    assert x.grad.shape == (0, 8)
    assert not weight.grad.any()


@pytest.mark.parametrize("segments", [[], [0, 9, 16, 15]])
@pytest.mark.parametrize("shape", ["rows", "three-leading"])
def test_opcheck_and_gradcheck(shape, segments) -> None:
    if segments and shape != "rows":
        segments = [0, 9, 16, 8]
    _, _, _, c_out, _ = SHAPES[shape]
    x, weight, bias = (t.requires_grad_() for t in tensors(SHAPES[shape], torch.float64))
    torch.library.opcheck(torch.ops.fastslim.slim_linear, (x, weight, bias, c_out, segments))
    torch.library.opcheck(torch.ops.fastslim.slim_linear, (x, weight, None, c_out, segments))
    pairs = tuple(zip(segments[::2], segments[1::2], strict=True)) or None
    assert torch.autograd.gradcheck(
        lambda *t: slim_linear(*t, c_out=c_out, segments=pairs), (x, weight, bias), fast_mode=True
    )


def test_impossible_widths_and_inputs_are_refused_by_name() -> None:
    x, weight, bias = tensors(SHAPES["rows"], torch.float32)
    with pytest.raises(errors.FastslimValueError, match="c_out=17 exceeds the layer's 16 features; choose 1 to 16"):
        slim_linear(x, weight, bias, c_out=17)
    with pytest.raises(errors.FastslimValueError, match="c_out=0 is no width of the layer's 16 features"):
        slim_linear(x, weight, bias, c_out=0)
    with pytest.raises(errors.FastslimValueError, match="input has 33 channels, but the layer has only 32"):
        slim_linear(torch.randn(2, 33), weight)
    with pytest.raises(errors.FastslimTypeError, match="x.float"):
        slim_linear(torch.ones(2, 24, dtype=torch.long), weight)


def test_parameters_on_another_device_are_refused_by_name() -> None:
    x, weight, bias = tensors(SHAPES["rows"], torch.float32)
    for moved, name in ((weight.to("meta"), "weight"), (bias.to("meta"), "bias")):
        arguments = (x, moved, bias) if name == "weight" else (x, weight, moved)
        with pytest.raises(errors.FastslimValueError, match=f"input on cpu, {name} on meta; move both to one device"):
            slim_linear(*arguments)


def test_what_a_bfloat16_product_gives_may_be_changed_in_place() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 6))
    for rows in ((4, 6), (2, 3, 6)):
        with torch.autocast("cpu", torch.bfloat16):
            y = slim_linear(torch.randn(rows, requires_grad=True), weight, c_out=5)
        torch.relu_(y).sum().backward()
        assert weight.grad is not None


@pytest.mark.parametrize("backward", [None, "library"])
def test_bfloat16_directions_may_be_computed_by_different_backends(backward) -> None:
    x, weight = torch.randn(7, 6).bfloat16(), torch.randn(8, 6)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        y = slim_linear(*leaves, c_out=5)
    with use_backend(backward):
        y.backward(torch.ones_like(y))
    exact = weight.bfloat16().double()[:5].sum(0).expand(7, 6)
    torch.testing.assert_close(leaves[0].grad.double(), exact, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(leaves[1].grad[:5].double(), x.double().sum(0).expand(5, 6), rtol=1e-2, atol=1e-2)
