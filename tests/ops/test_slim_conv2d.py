"""slim_conv2d against `F.conv2d` on the slice, judged in float64; in place, in every form of use."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS, assert_as_exact_as_torch, poison

from fastslim import errors
from fastslim.ops import slim_conv2d, use_backend
from fastslim.ops.step_buffers import StepBuffers
from fastslim.ops.weight_cache import Prefix

# c_out of C_out, c_in of C_in, kernel, stride, padding, dilation, groups, size
SHAPES = {
    "3x3": (24, 40, 16, 32, 3, 1, 1, 1, 1, (9, 7)),
    "3x3-stride2-odd": (5, 7, 3, 11, 3, 2, 1, 1, 1, (7, 8)),
    "1x1": (13, 32, 63, 64, 1, 1, 0, 1, 1, (5, 6)),
    "1x1-one-channel": (1, 8, 1, 8, 1, 1, 0, 1, 1, (4, 4)),
    "1x1-stride2": (8, 16, 8, 16, 1, 2, 0, 1, 1, (5, 5)),
    "5x5-dilated": (8, 8, 4, 12, 5, 1, 4, 2, 1, (9, 9)),
    "full": (16, 16, 12, 12, 3, 1, 1, 1, 1, (6, 6)),
    "1x1-full": (16, 16, 12, 12, 1, 1, 0, 1, 1, (6, 6)),
    "grouped": (12, 24, 8, 16, 3, 1, 1, 1, 4, (6, 5)),
    "grouped-one-group": (6, 24, 4, 16, 3, 1, 1, 1, 4, (6, 5)),
    "depthwise": (10, 16, 10, 16, 3, 2, 1, 1, 16, (7, 9)),
}


def slices(shape, weight):
    """The active slice of the weight and the number of active groups."""
    c_out, _, c_in, _, *_, groups, _ = shape
    if groups == 1:
        return weight[:c_out, :c_in], 1
    return weight[:c_out], c_in // weight.shape[1]


def tensors(shape, dtype, layout, batch=2):
    c_out, full_out, c_in, full_in, k, _, _, _, groups, size = shape
    torch.manual_seed(0)
    x = torch.randn(batch, c_in, *size).to(dtype).to(memory_format=LAYOUTS[layout])
    weight = torch.randn(full_out, full_in // groups, k, k).to(dtype).to(memory_format=LAYOUTS[layout])
    return x, weight, torch.randn(full_out).to(dtype)


def run(fn, x, weight, bias, grad=None):
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
    y = fn(*leaves)
    if grad is None:
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(grad.to(y))
    return y.detach(), [leaf.grad for leaf in leaves], grad


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [SHAPES["1x1"], SHAPES["1x1-one-channel"], SHAPES["3x3"]], ids=str)
def test_output_can_be_changed_in_place(shape, layout) -> None:
    c_out, *_, padding, _, _, _ = shape
    x, weight, bias = tensors(shape, torch.float32, layout)
    grad = torch.ones(2, c_out, *shape[-1])
    plain, changed = (
        run(lambda x, w, b, f=f: f(slim_conv2d(x, w, b, c_out=c_out, padding=padding)), x, weight, bias, grad)
        for f in (torch.relu, torch.relu_)
    )
    assert all(map(torch.equal, (changed[0], *changed[1]), (plain[0], *plain[1])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_gradients_are_as_exact_as_torch(shape, layout, dtype) -> None:
    c_out, _, c_in, _, _, stride, padding, dilation, groups, _ = shape
    x, weight, bias = tensors(shape, dtype, layout)
    settings = dict(stride=stride, padding=padding, dilation=dilation)

    def plain(x, w, b):
        active, active_groups = slices(shape, w)
        return F.conv2d(x, active, b[:c_out], **settings, groups=active_groups)

    def ours(x, w, b):
        return slim_conv2d(x, w, b, **settings, groups=groups, c_out=c_out)

    y, grads, upstream = run(ours, x, weight, bias)
    y_torch, grads_torch, _ = run(plain, x, weight, bias, upstream)
    y_true, grads_true, _ = run(plain, x.double(), weight.double(), bias.double(), upstream)
    assert_as_exact_as_torch(y, y_torch, y_true)
    assert y.is_contiguous(memory_format=LAYOUTS[layout])
    for mine, theirs, true in zip(grads, grads_torch, grads_true, strict=True):
        assert_as_exact_as_torch(mine, theirs, true)
    repeated, grads_again, _ = run(ours, x, weight, bias, upstream)
    assert torch.equal(y, repeated)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_weights_outside_the_prefix_are_never_read(shape, layout) -> None:
    c_out, _, c_in, _, _, stride, padding, dilation, groups, _ = shape
    x, weight, bias = tensors(shape, torch.float32, layout)
    active = (slice(c_out), slice(c_in)) if groups == 1 else (slice(c_out),)
    weight, bias = poison(weight, *active), poison(bias, slice(c_out))
    y, grads, _ = run(
        lambda x, w, b: slim_conv2d(
            x, w, b, stride=stride, padding=padding, dilation=dilation, groups=groups, c_out=c_out
        ),
        x, weight, bias,
    )  # fmt: skip
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_a_step_gradients_are_added_to_the_prefix_and_nothing_else_is_touched(shape, layout) -> None:
    c_out, full_out, c_in, full_in, _, stride, padding, dilation, groups, _ = shape
    x, weight, bias = tensors(shape, torch.float64, layout)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    settings = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    expected = torch.autograd.grad(slim_conv2d(x, weight, bias, **settings, c_out=c_out).sum(), (weight, bias))
    before = [torch.randn_like(p) for p in (weight, bias)]
    buffers = StepBuffers([weight, bias])
    weight.grad, bias.grad = (b.clone() for b in before)
    buffers.begin(accumulate=True)
    with buffers.active():
        slim_conv2d(x, weight, bias, **settings, c_out=c_out).sum().backward()
    buffers.finish()
    for p, old, new in zip((weight, bias), before, expected, strict=True):
        torch.testing.assert_close(p.grad, old + new, rtol=1e-12, atol=1e-12)
    outside = torch.ones_like(weight, dtype=torch.bool)
    outside[(slice(c_out), slice(c_in)) if groups == 1 else (slice(c_out),)] = False
    assert torch.equal(weight.grad[outside], before[0][outside])


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_segments_take_the_channels_a_concat_gives(kernel, layout) -> None:
    torch.manual_seed(0)
    segments = ((0, 5), (16, 3), (24, 8))
    x = torch.randn(2, 16, 6, 5, dtype=torch.float64).to(memory_format=LAYOUTS[layout]).requires_grad_()
    weight = torch.full((20, 32, kernel, kernel), float("nan"), dtype=torch.float64)
    columns = torch.cat([torch.arange(start, start + count) for start, count in segments])
    weight[:7, columns] = torch.randn(7, 16, kernel, kernel, dtype=torch.float64)
    weight.requires_grad_()
    y = slim_conv2d(x, weight, padding=kernel // 2, c_out=7, segments=segments)
    expected = F.conv2d(x, weight[:7, columns], padding=kernel // 2)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(y)
    for mine, theirs in zip(
        torch.autograd.grad(y, (x, weight), upstream), torch.autograd.grad(expected, (x, weight), upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_grouped_segments_select_whole_groups() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    weight = torch.randn(24, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    y = slim_conv2d(x, weight, padding=1, groups=4, segments=((0, 4), (8, 4)))
    expected = F.conv2d(x, torch.cat([weight[:6], weight[12:18]]), padding=1, groups=2)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), weight)[0], torch.autograd.grad(expected.sum(), weight)[0])


@pytest.mark.parametrize("kernel", [1, 3])
def test_empty_batch_gives_empty_output_and_zero_gradients(kernel) -> None:
    x = torch.randn(0, 4, 5, 5, requires_grad=True)
    weight = torch.randn(8, 8, kernel, kernel, requires_grad=True)
    y = slim_conv2d(x, weight, padding=kernel // 2, c_out=6)
    y.sum().backward()
    assert y.shape == (0, 6, 5, 5)
    assert x.grad.shape == x.shape
    assert not weight.grad.any()


@pytest.mark.parametrize("shape", ["3x3", "1x1", "grouped"])
def test_gradcheck(shape) -> None:
    c_out, _, _, _, _, stride, padding, dilation, groups, _ = SHAPES[shape]
    x, weight, bias = tensors(SHAPES[shape], torch.float64, "nhwc", batch=1)
    x = x[:, :, :3, :3]
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda x, w, b: slim_conv2d(
            x, w, b, stride=stride, padding=padding, dilation=dilation, groups=groups, c_out=c_out
        ),
        leaves,
        fast_mode=True,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["3x3-stride2-odd", "1x1", "grouped"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(shape, layout, with_bias) -> None:
    c_out, _, _, _, _, stride, padding, dilation, groups, _ = SHAPES[shape]
    x, weight, bias = (t.requires_grad_() for t in tensors(SHAPES[shape], torch.float32, layout))
    conv = ([stride] * 2, [padding] * 2, [dilation] * 2, groups, c_out, [])
    torch.library.opcheck(torch.ops.fastslim.slim_conv2d, (x, weight, bias if with_bias else None, *conv))
    grad = torch.randn_like(torch.ops.fastslim.slim_conv2d(x, weight, None, *conv)).detach()
    args = (grad, x.detach(), weight.detach(), *conv, [True, True, with_bias])
    torch.library.opcheck(torch.ops.fastslim.slim_conv2d_backward, args)


def test_torch_compile_gives_the_same() -> None:
    x, weight, bias = (t.requires_grad_() for t in tensors(SHAPES["3x3"], torch.float32, "nchw"))
    compiled = torch.compile(
        lambda x: slim_conv2d(x, weight, bias, padding=1, c_out=24), fullgraph=True, backend="aot_eager"
    )
    y = compiled(x)
    y.sum().backward()
    grad, weight.grad = weight.grad, None
    expected = slim_conv2d(x, weight, bias, padding=1, c_out=24)
    expected.sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grad, weight.grad)


def test_autocast_computes_in_bf16_and_gives_fp32_gradients() -> None:
    x, weight, bias = (t.requires_grad_() for t in tensors(SHAPES["3x3"], torch.float32, "nhwc"))
    with torch.autocast("cpu", torch.bfloat16):
        y = slim_conv2d(x, weight, bias, padding=1, c_out=24)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert {t.grad.dtype for t in (x, weight, bias)} == {torch.float32}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(c_out=72), "c_out=72 exceeds the layer's 40 channels; choose 1 to 40"),
        (dict(c_out=0), "c_out=0 is no width of the layer's 40 channels; choose 1 to 40"),
        (dict(segments=((0, 8),)), "take 8 channels, but the input has 16"),
        (dict(segments=((8, 8), (0, 8))), "must be in order"),
    ],
)
def test_impossible_widths_are_refused_by_name(kwargs, message) -> None:
    x, weight, bias = tensors(SHAPES["3x3"], torch.float32, "nchw")
    with pytest.raises(errors.FastslimValueError, match=message):
        slim_conv2d(x, weight, bias, padding=1, **kwargs)


def test_unfit_inputs_are_refused_by_name() -> None:
    x, weight, _ = tensors(SHAPES["3x3"], torch.float32, "nchw")
    with pytest.raises(errors.FastslimTypeError, match="images.float"):
        slim_conv2d((x * 10).to(torch.uint8), weight)
    with pytest.raises(errors.FastslimTypeError, match="convert one, or run under torch.autocast"):
        slim_conv2d(x.double(), weight)
    with pytest.raises(errors.FastslimValueError, match="input has 33 channels, but the layer has only 32"):
        slim_conv2d(torch.randn(1, 33, 5, 5), weight)
    with pytest.raises(errors.FastslimValueError, match="add the batch dimension"):
        slim_conv2d(x[0], weight)
    with pytest.raises(errors.FastslimValueError, match="whole groups of 4"):
        slim_conv2d(torch.randn(1, 6, 5, 5), torch.randn(24, 4, 3, 3), groups=4)


def test_reference_backend_is_the_definition() -> None:
    x, weight, bias = tensors(SHAPES["3x3"], torch.float64, "nchw")
    with use_backend("reference"):
        y = slim_conv2d(x, weight, bias, padding=1, c_out=24)
    assert torch.equal(y, F.conv2d(x, weight[:24, :16], bias[:24], padding=1))


@pytest.mark.parametrize("segments", [None, ((0, 5), (16, 3))])
def test_what_the_pass_has_packed_is_read_instead_of_the_weight(segments) -> None:
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(12, 24, 3, 3, requires_grad=True)
    expected = slim_conv2d(x, weight, padding=1, c_out=6, segments=segments)
    true = torch.autograd.grad(expected.square().sum(), (x, weight))
    buffers = StepBuffers([weight], collect=True)
    buffers.begin()
    buffers.weights.pack([(weight, torch.float32, Prefix(6, 8, segments))])
    with torch.no_grad():
        weight.fill_(float("nan"))
    # Our C++ kernels read the parameter itself.
    with buffers.active(), use_backend("library"):
        y = slim_conv2d(x, weight, padding=1, c_out=6, segments=segments)
        y.square().sum().backward()
    buffers.finish()
    torch.testing.assert_close((y, x.grad, weight.grad), (expected, *true))


def test_parameters_on_another_device_are_refused_by_name() -> None:
    x, weight, bias = tensors(SHAPES["3x3"], torch.float32, "nchw")
    for moved, name in ((weight.to("meta"), "weight"), (bias.to("meta"), "bias")):
        arguments = (x, moved, bias) if name == "weight" else (x, weight, moved)
        with pytest.raises(errors.FastslimValueError, match=f"input on cpu, {name} on meta; move both to one device"):
            slim_conv2d(*arguments, padding=1)
