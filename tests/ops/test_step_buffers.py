"""The flat gradient buffer behaves as plain autograd does, from outside."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastslim.ops import slim_linear
from fastslim.ops.step_buffers import StepBuffers, active_cast, active_slot, count_batch
from fastslim.ops.weight_cache import Prefix


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 6).double()


def test_gradients_are_views_of_one_flat_tensor() -> None:
    linear, x = layer(), torch.randn(4, 8, dtype=torch.float64)
    buffers = StepBuffers(linear.parameters())
    buffers.begin()
    with buffers.active():
        slim_linear(x, linear.weight, linear.bias).sum().backward()
    buffers.finish()
    (flat,) = buffers.flat.values()
    for p in linear.parameters():
        assert p.grad.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
        assert p.grad.data_ptr() % 64 == flat.data_ptr() % 64


def test_first_gradient_of_a_step_overwrites_what_an_earlier_step_left() -> None:
    linear, x = layer(), torch.randn(4, 8, dtype=torch.float64)
    buffers = StepBuffers(linear.parameters())
    for flat in buffers.flat.values():
        flat.fill_(float("nan"))
    for width in (6, 3):  # full, then a prefix: what the prefix leaves out must be zero
        buffers.begin()
        with buffers.active():
            slim_linear(x, linear.weight, linear.bias, c_out=width).sum().backward()
        buffers.finish()
        expected = torch.autograd.grad(F.linear(x, linear.weight, linear.bias)[:, :width].sum(), linear.weight)[0]
        torch.testing.assert_close(linear.weight.grad, expected)


def test_parameter_no_pass_reaches_keeps_no_gradient() -> None:
    linear, unused = layer(), layer()
    buffers = StepBuffers([*linear.parameters(), *unused.parameters()])
    buffers.begin()
    with buffers.active():
        slim_linear(torch.randn(4, 8, dtype=torch.float64), linear.weight, linear.bias).sum().backward()
    buffers.finish()
    assert unused.weight.grad is None
    assert linear.weight.grad is not None


def test_gradients_of_ordinary_layers_join_the_buffer() -> None:
    linear, ordinary = layer(), nn.Linear(6, 2).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    expected = torch.autograd.grad(ordinary(linear(x)).sum(), ordinary.weight)[0]
    buffers = StepBuffers([*linear.parameters(), *ordinary.parameters()])
    buffers.begin()
    with buffers.active():
        for _ in range(2):
            ordinary(slim_linear(x, linear.weight, linear.bias)).sum().backward()
    buffers.finish()
    torch.testing.assert_close(ordinary.weight.grad, 2 * expected)
    (flat,) = buffers.flat.values()
    assert ordinary.weight.grad.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()


def test_sparse_gradients_stay_sparse_unless_a_slim_op_shares_the_parameter() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(6, 8, sparse=True).double()
    words, x = torch.tensor([1, 4, 1]), torch.randn(4, 8, dtype=torch.float64)
    once = torch.autograd.grad(F.embedding(words, table.weight).sum(), table.weight)[0]
    tied = once + torch.autograd.grad(F.linear(x, table.weight).sum(), table.weight)[0]
    buffers = StepBuffers(table.parameters())
    for accumulate in (False, True):
        buffers.begin(accumulate=accumulate)
        with buffers.active():
            table(words).sum().backward()
        buffers.finish()
        assert table.weight.grad.is_sparse
        torch.testing.assert_close(table.weight.grad.to_dense(), (1 + accumulate) * once)
    buffers.begin()
    with buffers.active():
        (table(words).sum() + slim_linear(x, table.weight).sum()).backward()
    buffers.finish()
    torch.testing.assert_close(table.weight.grad, tied)


def test_accumulating_keeps_gradients_the_user_put_there() -> None:
    linear, x = layer(), torch.randn(4, 8, dtype=torch.float64)
    linear.weight.grad = torch.ones_like(linear.weight)
    expected = torch.autograd.grad(linear(x).sum(), linear.weight)[0] + 1
    buffers = StepBuffers(linear.parameters())
    buffers.begin(accumulate=True)
    with buffers.active():
        slim_linear(x, linear.weight, linear.bias).sum().backward()
    buffers.finish()
    torch.testing.assert_close(linear.weight.grad, expected)


def test_outside_a_step_ops_return_ordinary_gradients() -> None:
    linear, x = layer(), torch.randn(4, 8, dtype=torch.float64)
    StepBuffers(linear.parameters()).begin()
    assert active_slot(linear.weight) is None
    grad = torch.autograd.grad(slim_linear(x, linear.weight, linear.bias, c_out=4).sum(), linear.weight)[0]
    assert grad.shape == (6, 8)
    assert linear.weight.grad is None


def test_weights_are_cast_once_per_step_into_the_same_memory() -> None:
    linear = layer()
    buffers = StepBuffers(linear.parameters())
    buffers.begin()
    with buffers.active():
        first = active_cast(linear.weight, torch.bfloat16)
        assert active_cast(linear.weight, torch.bfloat16) is first
    with torch.no_grad():
        linear.weight.add_(1)
    buffers.begin()
    with buffers.active():
        second = active_cast(linear.weight, torch.bfloat16)
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(second, linear.weight.to(torch.bfloat16))


@pytest.mark.parametrize("change", [lambda m: m.float(), lambda m: copy.deepcopy(m), lambda m: m.requires_grad_(False)])
def test_buffers_notice_that_they_no_longer_fit(change) -> None:
    linear = layer()
    buffers = StepBuffers(linear.parameters())
    assert buffers.matches(linear.parameters())
    assert not buffers.matches(change(linear).parameters())


@pytest.mark.parametrize("collect", [False, True])
def test_a_module_called_twice_in_a_pass_counts_two_batches(collect) -> None:
    counter = torch.zeros((), dtype=torch.long)
    buffers = StepBuffers(layer().parameters(), collect=collect)
    buffers.begin()
    with buffers.active():
        count_batch(counter)
        count_batch(counter)
    assert len(buffers._counters) == 1  # all are added to at once: no number may be there twice
    buffers.end_pass()
    assert counter == 2


def test_weights_on_several_devices_are_cast_and_packed_on_each() -> None:
    weights = [nn.Parameter(torch.randn(4, 4, 3, 3, device=device)) for device in ("cpu", "meta")]
    buffers = StepBuffers(weights, collect=True)
    for _ in range(2):
        buffers.begin()
        buffers.weights.pack([(weight, torch.bfloat16, Prefix(2, 3, None)) for weight in weights])
    packed = buffers.weights.packed(weights[0], torch.bfloat16, Prefix(2, 3, None))
    assert torch.equal(packed, weights[0].detach()[:2, :3].bfloat16())


def test_layers_that_share_a_weight_do_not_share_the_memory_of_its_parts() -> None:
    weight = nn.Parameter(torch.randn(4, 4, 3, 3))
    cache, wide, narrow = StepBuffers([weight]).weights, Prefix(4, 3, None), Prefix(2, 2, None)
    cache.pack([(weight, torch.float32, wide), (weight, torch.float32, narrow)])
    assert torch.equal(cache.packed(weight, torch.float32, wide), weight.detach()[:, :3])
    assert cache.packed(weight, torch.float32, narrow) is None  # that layer packs its own
