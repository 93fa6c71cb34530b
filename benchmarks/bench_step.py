"""The sandwich step (max + min + 2 random subnets) against a plain full-width step and a hand-written slicing loop.

The slicing loop is tests/plain_loop.py: `torch.nn.functional` on `weight[:o, :i]`, as one would write it.
Each side runs in the memory format that is faster for it.
"""

from __future__ import annotations

import copy
import itertools
import time
from functools import partial

import plain_loop
import pytest
import torch
import torch.nn.functional as F

import fastslim
from fastslim import models

CASES = {  # model, plain forward, batch, pixels
    "resnet18": (models.resnet18, partial(plain_loop.resnet18, small_images=False), 16, 112),
    "resnet50": (models.resnet50, plain_loop.resnet50, 8, 128),
    "mobilenet_v2": (models.mobilenet_v2, partial(plain_loop.mobilenet_v2, small_images=False), 16, 112),
}
FORMATS = (torch.channels_last, torch.contiguous_format)
SUBNETS = 8  # random subnets drawn once and used by turns, the same for both sides


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def faster(sides):
    """The side whose step is faster."""

    def seconds(run):
        run()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return min(sides, key=seconds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_sandwich_step(against, name, dtype):
    build, forward, batch, pixels = CASES[name]
    torch.manual_seed(0)
    model = without_dropout(build())
    images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(0, 1000, (batch,))
    precision = partial(torch.autocast, "cpu", dtype, enabled=dtype != torch.float32)
    algo = fastslim.AutoSlim(architecture=copy.deepcopy(model), example_inputs=images[:1], seed=0)
    with precision():
        report = fastslim.verify(algo, (images[:4, :, :64, :64], labels[:4]))
    assert report, f"no speed of a wrong step:\n{report}"
    randoms = [algo.sample_subnet() for _ in range(SUBNETS)]
    layers = {n: m for n, m in algo.architecture.named_modules() if hasattr(m, "active_out")}

    def widths(choices):
        algo.set_subnet(choices)
        return {n: layer.active_out for n, layer in layers.items()}

    fixed = [widths(algo.mutator.max_choices), widths(algo.mutator.min_choices)]
    random_widths = [widths(choices) for choices in randoms]

    def plain(fmt):
        net, x = copy.deepcopy(model).to(memory_format=fmt), images.to(memory_format=fmt)
        optimizer = optimizer_of(net)

        def step():
            optimizer.zero_grad()
            with precision():
                loss = F.cross_entropy(net(x).float(), labels)
            loss.backward()
            optimizer.step()

        return step

    def slicing_loop(fmt):
        net, x = copy.deepcopy(model).to(memory_format=fmt), images.to(memory_format=fmt)
        view, optimizer, turn = plain_loop.Net(net), optimizer_of(net), itertools.cycle(range(0, SUBNETS, 2))

        def step():
            optimizer.zero_grad()
            index = next(turn)
            with precision():
                plain_loop.sandwich_passes(view, forward, x, labels, [*fixed, *random_widths[index : index + 2]])
            optimizer.step()

        return step

    def ours(fmt):
        own, x = copy.deepcopy(algo).to(memory_format=fmt), images.to(memory_format=fmt)
        optimizer, turn = optimizer_of(own), itertools.cycle(randoms)
        own.sample_subnet = lambda: next(turn)

        def step():
            with precision():
                own.train_step((x, labels), optimizer)

        return step

    sides = [faster([side(fmt) for fmt in FORMATS]) for side in (ours, plain, slicing_loop)]
    against(sides[0], plain_step=sides[1], slicing_loop=sides[2])
