"""torch's fused optimizers: where the engine takes them, their steps are those of the loop in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastslim
from fastslim.engine.config import TrainConfig
from fastslim.engine.schedule import can_fuse, make_optimizer
from fastslim.models import resnet18

OPTIMIZERS = ("sgd", "adam", "adamw")
FORMATS = [
    pytest.param(torch.contiguous_format, id="nchw"),
    pytest.param(torch.channels_last, id="channels_last"),
]


def unfused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimizer as a loop, at its first step."""
    for group in optimizer.param_groups:
        group["fused"] = False
    optimizer.state.clear()
    return optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_fused_steps_over_flat_gradients_equal_the_loop(name: str, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randint(10, (4,))
    network = resnet18(num_classes=10, width_mult=0.25, small_images=True).double()
    fast = fastslim.AutoSlim(architecture=network, example_inputs=images, seed=0).to(memory_format=memory_format)
    loop = copy.deepcopy(fast)
    config = TrainConfig(optimizer=name, lr=0.01, weight_decay=0.1)
    optimizers = [make_optimizer(fast, config), unfused(make_optimizer(loop, config))]
    assert optimizers[0].param_groups[0]["fused"]
    for _ in range(3):
        for algo, optimizer in zip((fast, loop), optimizers, strict=True):
            algo.train_step((images.contiguous(memory_format=memory_format), labels), optimizer)
    for (key, ours), theirs in zip(fast.named_parameters(), loop.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_that_comes_late_is_a_first_step(name: str) -> None:
    config = TrainConfig(optimizer=name, lr=0.1, weight_decay=0.1)
    results = []
    for change in (lambda optimizer: optimizer, unfused):
        model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]).double()
        nn.init.ones_(model[0].weight), nn.init.ones_(model[1].weight)
        optimizer = change(make_optimizer(model, config))
        for step in range(3):
            for layer in model[: 1 + step]:
                layer.weight.grad = torch.full_like(layer.weight, 1.0 + step)
            optimizer.step()
        results.append([layer.weight for layer in model])
    torch.testing.assert_close(*results, rtol=1e-14, atol=0)


def with_gaps() -> nn.Module:
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.randn(4, 8)[:, :4])
    return model


@pytest.mark.parametrize(
    "model", [nn.Embedding(4, 4, sparse=True), with_gaps(), nn.Linear(2, 2, dtype=torch.complex64)], ids=str
)
def test_what_the_fused_kernels_cannot_do_goes_by_the_loop(model: nn.Module) -> None:
    assert not can_fuse(model)
    assert not make_optimizer(model, TrainConfig()).param_groups[0]["fused"]
