"""At every width a slim layer is the plain torch layer of that size: numbers, gradients, statistics, export."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from cases import assert_as_exact_as_torch
from layer_cases import CASES, randomised, spread, take
from torch import Tensor, nn

from fastslim.nn import SLIM_CLASSES, SlimBatchNorm
from fastslim.ops.step_buffers import StepBuffers

TIGHT = dict(rtol=1e-12, atol=1e-12)
names = pytest.mark.parametrize("name", CASES)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def gradients(layer: nn.Module, x: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Output, gradient of the input and upstream gradient; the parameters' are left in `.grad`."""
    x = x.clone().requires_grad_(x.is_floating_point())
    y = layer(x)
    upstream = torch.randn_like(y) if upstream is None else upstream
    y.backward(upstream) if y.requires_grad else None
    return y.detach(), x.grad, upstream


@modes
@names
def test_numbers_gradients_and_statistics_are_the_plain_narrow_layers(name, training) -> None:
    case, x = CASES[name], CASES[name].input()
    slim = case.slim().train(training)
    before, plain = copy.deepcopy(slim.state_dict()), case.plain(slim)
    y, gx, upstream = gradients(slim, x)
    expected, their_gx, _ = gradients(plain, x, upstream)
    torch.testing.assert_close(y, expected, **TIGHT)
    if gx is not None:
        torch.testing.assert_close(gx, their_gx, **TIGHT)
    theirs = dict(plain.named_parameters())
    for key, p in slim.named_parameters():
        grad, their = (g.to_dense() for g in (p.grad, theirs[key].grad))
        torch.testing.assert_close(grad, spread(their, p, case.index.get(key, ())), **TIGHT)
    for key, buffer in slim.named_buffers():
        index = case.index.get(key, ())
        untouched = before[key] - spread(take(before[key], index), before[key], index)
        their = spread(plain.get_buffer(key), buffer, index)
        torch.testing.assert_close(buffer, their + untouched, **TIGHT)


@names
def test_what_is_not_active_is_never_read(name) -> None:
    case, x = CASES[name], CASES[name].input()
    slim = case.slim().eval()
    expected = slim(x)
    with torch.no_grad():
        for key, value in slim.state_dict().items():
            index = case.index.get(key, ())
            mask = spread(torch.ones_like(take(value, index)), value, index) == 0
            value[mask] = float("nan") if value.is_floating_point() else 0
    y = slim(x)
    assert torch.equal(y, expected)
    if y.requires_grad:
        y.sum().backward()
        assert all(torch.isfinite(p.grad.to_dense()).all() for p in slim.parameters())


@names
def test_plain_form_is_an_exact_plain_layer(name) -> None:
    case, x = CASES[name], CASES[name].input()
    slim = case.slim().eval()
    next(slim.parameters(), torch.empty(0)).requires_grad_(False)
    slim.register_forward_hook(lambda *_: None)
    given = {} if case.channels is None else dict(in_channels=case.channels)
    plain, reference = slim.to_torch(**given), case.plain(slim)
    assert type(plain) is type(reference)
    assert repr(plain) == repr(reference)
    assert plain.__dict__.keys() == reference.__dict__.keys()
    assert not plain.training
    assert not plain._forward_hooks
    assert [p.requires_grad for p in plain.parameters()] == [p.requires_grad for p in slim.parameters()]
    for key, value in reference.state_dict().items():
        assert torch.equal(plain.state_dict()[key], value)
    assert torch.equal(plain(x), reference(x))
    assert not {p.data_ptr() for p in plain.parameters()} & {p.data_ptr() for p in slim.parameters()}


@names
def test_copies_and_saved_layers_keep_their_width(name) -> None:
    case, x = CASES[name], CASES[name].input()
    slim = case.slim().eval()
    file = io.BytesIO()
    torch.save(slim, file)
    file.seek(0)
    for other in (copy.deepcopy(slim), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), slim(x))
        assert repr(other) == repr(slim)


@names
def test_gradients_inside_a_step_are_the_ordinary_ones(name) -> None:
    case, x = CASES[name], CASES[name].input()
    slim = case.slim().eval()
    if not [*slim.parameters()]:
        return
    _, _, upstream = gradients(slim, x)
    expected = [p.grad for p in slim.parameters()]
    buffers = StepBuffers(slim.parameters())
    buffers.begin()
    with buffers.active():
        for _ in range(2):
            gradients(slim, x, upstream)
    buffers.finish()
    for p, once in zip(slim.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad.to_dense(), 2 * once.to_dense(), **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@names
def test_low_precision_is_as_exact_as_torch(name, dtype) -> None:
    case, x = CASES[name], CASES[name].input()
    slim = case.slim().eval().to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    exact = copy.deepcopy(slim).double()
    plain = case.plain(slim)
    truth = exact(x.double() if x.is_floating_point() else x)
    assert_as_exact_as_torch(slim(x), plain.to(dtype)(x), truth)


@modes
@names
def test_full_width_is_torch_bit_for_bit(name, training) -> None:
    torch.manual_seed(0)
    plain = randomised(CASES[name].full().double()).train(training)
    slim = SLIM_CLASSES[type(plain)].from_torch(copy.deepcopy(plain))
    assert slim.state_dict().keys() == plain.state_dict().keys()
    shape = CASES[name].shape
    x = CASES[name].input()
    if x.is_floating_point():
        wide = 8 if isinstance(plain, nn.PReLU) and plain.num_parameters == 1 else None
        channels = wide or getattr(slim, "in_channels", None) or getattr(slim, "in_features", None) or slim._full_out()
        dim = channel_dim(plain, len(shape))
        x = torch.randn(*shape[:dim], channels, *shape[dim + 1 :], dtype=torch.float64)
    y, gx, upstream = gradients(slim, x)
    expected, their_gx, _ = gradients(plain, x, upstream)
    # Our own batch norm and depthwise kernels round differently; everything else is torch's kernel.
    own = isinstance(slim, SlimBatchNorm) or (isinstance(slim, nn.Conv2d) and not slim.transposed)
    tolerance = TIGHT if own or isinstance(slim, nn.Linear) else dict(rtol=0, atol=0)
    torch.testing.assert_close(y, expected, **tolerance)
    torch.testing.assert_close(gx, their_gx, **tolerance)
    for mine, their in zip(slim.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.to_dense(), their.grad.to_dense(), **tolerance)
    for mine, their in zip(slim.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, their, **tolerance)


def channel_dim(layer: nn.Module, dims: int) -> int:
    if isinstance(layer, (nn.Linear, nn.LayerNorm, nn.RMSNorm)):
        return dims - len(getattr(layer, "normalized_shape", (1,)))
    if isinstance(layer, nn.modules.conv._ConvNd):
        return dims - 1 - len(layer.kernel_size)
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        return dims - layer._get_no_batch_dim() if dims > layer._get_no_batch_dim() else 0
    return 1
