"""A convolution and its batch norm in one step of autograd: the bits of the two layers, and everyone who looks on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastslim import _ext
from fastslim.nn import SlimBatchNorm2d, SlimConv2d
from fastslim.nn.conv_batch_norm import conv_batch_norm_of
from fastslim.ops.step_buffers import StepBuffers

pytestmark = pytest.mark.skipif(
    _ext.BUILD["cpu_isa"] not in ("avx512", "avx512_bf16") or not _ext.BUILD["blas"],
    reason="the library computes convolutions here, so that layers are not called together",
)


def layers(c_in=12, c_out=16, kernel=3, stride=1, groups=1):
    torch.manual_seed(0)
    conv = SlimConv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    norm = SlimBatchNorm2d(c_out)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    if groups == 1:
        conv.set_width(out=8)
    return nn.ModuleList([conv, norm]).to(memory_format=torch.channels_last)


def images(channels=8, size=6, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)


def run(pair, x, together=True, residual=None, activation="relu6", passes=2):
    """Output, whether it was one step, gradients of inputs and parameters, statistics."""
    conv, norm = pair
    call = conv_batch_norm_of(conv, norm) if together else lambda x, *rest: norm(conv(x), *rest)
    buffers = StepBuffers(pair.parameters())
    buffers.begin()
    x = x.detach().requires_grad_()
    residual = None if residual is None else residual.detach().requires_grad_()
    for _ in range(passes):
        with buffers.active():
            y = call(x, residual, activation)
            y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        buffers.end_pass()
    buffers.finish()
    grads = [x.grad, None if residual is None else residual.grad, *(p.grad for p in pair.parameters())]
    return y.detach(), type(y.grad_fn).__name__ == "_ConvBatchNormBackward", [*grads, *pair.buffers()]


def assert_same(one, other):
    assert torch.equal(one[0], other[0])
    for mine, theirs in zip(one[2], other[2], strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("activation", ["none", "relu", "hardswish"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    "shape",
    [dict(kernel=1), dict(), dict(stride=2), dict(c_in=16, groups=16), dict(c_in=16, groups=16, stride=2)],
    ids=lambda shape: "-".join(f"{key}{value}" for key, value in shape.items()) or "3x3",
)
def test_bits_are_those_of_the_two_layers(shape, with_residual, activation):
    pair, x = layers(**shape), images()
    residual = images(8, 6 // shape.get("stride", 1)) if with_residual else None
    ours = run(copy.deepcopy(pair), x, residual=residual, activation=activation)
    theirs = run(copy.deepcopy(pair), x, together=False, residual=residual, activation=activation)
    assert ours[1]
    assert not theirs[1]
    assert_same(ours, theirs)


@pytest.mark.skipif(not _ext.BUILD["slim_conv2d_bf16"], reason="the library computes bfloat16 here")
@pytest.mark.parametrize("groups", [1, 16])
def test_bits_are_those_of_the_two_layers_under_autocast(groups):
    pair, x = layers(c_in=16, groups=groups), images().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (run(copy.deepcopy(pair), x, together=together) for together in (True, False))
    assert ours[0].dtype == torch.bfloat16
    assert ours[1] or groups > 1
    assert_same(ours, theirs)


def _hook(pair):
    pair[0].register_forward_hook(lambda *_: None)


def _parameter_hook(pair):
    pair[1].weight.register_hook(lambda gradient: None)


def _own_forward(pair):
    pair[0].forward = lambda x: SlimConv2d.forward(pair[0], x)


def _segments(pair):
    pair[0].set_width(out=8, segments=((0, 4), (8, 4)))


def _frozen(pair):
    pair[1].bias.requires_grad_(False)


def _eval(pair):
    pair.eval()


def _parametrized(pair):
    nn.utils.parametrize.register_parametrization(pair[0], "weight", nn.Identity())


def _wide(pair):
    pair.double()


def _average(pair):
    pair[1].momentum = None


@pytest.mark.parametrize(
    "change",
    [_hook, _parameter_hook, _own_forward, _segments, _frozen, _eval, _parametrized, _wide, _average],
    ids=lambda change: change.__name__[1:],
)
def test_layers_run_their_own_forward_where_someone_could_tell(change):
    pair, x = layers(), images()
    change(pair)
    x = x.to(pair[0].weight.dtype)
    ours = run(pair, x, passes=1)
    again = layers()
    change(again)
    assert not ours[1]
    assert_same(ours, run(again, x, together=False, passes=1))


def test_a_hook_that_comes_later_is_called():
    pair, x, seen = layers(), images(), []
    conv, norm = pair
    call = conv_batch_norm_of(conv, norm)
    with StepBuffers(pair.parameters()).active():
        call(x)
        conv.register_forward_hook(lambda *_: seen.append("conv"))
        call(x)
        handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append("any"))
        try:
            call(x)
        finally:
            handle.remove()
    assert seen == ["conv", "any", "conv", "any"]


def test_outside_a_step_gradients_are_autograds():
    pair, x = layers(), images()
    y = conv_batch_norm_of(*pair)(x, None, "relu")
    y.sum().backward()
    assert type(y.grad_fn).__name__ == "_FusedBackward"
    assert pair[0].weight.grad is not None


def test_backward_cannot_be_differentiated_again():
    pair, x = layers(), images().requires_grad_()
    with StepBuffers(pair.parameters()).active():
        y = conv_batch_norm_of(*pair)(x, None, "none")
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@pytest.mark.parametrize("batch", [1, 2])
def test_input_that_does_not_fit_is_told_as_by_the_layers(batch):
    pair = layers(c_in=4)
    with StepBuffers(pair.parameters()).active(), pytest.raises(ValueError, match="has 8 channels"):
        conv_batch_norm_of(*pair)(images(batch=batch))
