"""What a step allocates and copies, read from the profiler: nothing of weight size, and no more than a plain step."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fastslim
from fastslim import models
from fastslim._ext import BUILD
from fastslim.bench import Task, peak_of_training, plain_side, sandwich_side

# Elsewhere the library computes k x k convolutions: it wants dense weights and makes dense gradients.
OWN_CONVOLUTIONS = "avx512" in str(BUILD["cpu_isa"])


def profiled(run, **options):
    with profile(activities=[ProfilerActivity.CPU], **options) as result:
        run()
    return result


def algorithm_and_step(net, images, labels):
    algo = fastslim.AutoSlim(architecture=net, example_inputs=images[:1], seed=0)
    algo = algo.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(algo.parameters(), 1e-3, 0.9)
    images = images.to(memory_format=torch.channels_last)
    return algo, optimizer, lambda: algo.train_step((images, labels), optimizer)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_second_step_makes_no_weight_size_copy_fill_or_allocation(name) -> None:
    # Images so small that every large tensor is a weight or a gradient.
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 10, (2,))
    algo, _, step = algorithm_and_step(models.create_model(name, num_classes=10), images, labels)
    step()
    weights = {tuple(p.shape) for p in algo.parameters() if p.numel() >= 100_000}
    assert weights
    smallest = min(map(math.prod, weights))
    assert 2 * 96 * 16 * 16 * 2 < smallest  # twice the largest activation
    events = profiled(step, record_shapes=True, profile_memory=True).events()

    def inside_library(event) -> bool:
        """The library's dense k x k convolution makes its weight gradient itself, as in a plain step."""
        while event is not None:
            if event.name == "aten::convolution_backward":
                return True
            event = event.cpu_parent
        return False

    def is_large(event) -> bool:
        return any(math.prod(shape) >= smallest for shape in event.input_shapes if shape)

    fills = [e.name for e in events if e.name in ("aten::zero_", "aten::fill_", "aten::zeros") and is_large(e)]
    assert not fills
    allocated = [
        (e.name, e.cpu_memory_usage)
        for e in events
        if e.name.startswith("aten::empty")
        and e.cpu_memory_usage >= 4 * smallest
        # A prefix narrower than the layer is laid out densely for the library, once per pass.
        and (OWN_CONVOLUTIONS or not (inside_library(e) or _packs_a_prefix(e, weights)))
    ]
    assert not allocated
    # What is moved at full size is the gradient of the library's own convolutions on its way into the flat
    # buffer, once per layer; 1x1 products at stride 1 write there themselves.
    copies = [tuple(e.input_shapes[0]) for e in events if e.name == "aten::copy_" and is_large(e)]
    moved = [e for e in copies if e in weights]
    if OWN_CONVOLUTIONS:
        assert not moved
        return
    library = [
        tuple(m.weight.shape)
        for m in algo.modules()
        if isinstance(m, torch.nn.Conv2d) and (m.kernel_size > (1, 1) or m.stride > (1, 1))
    ]
    in_library = [tuple(e.input_shapes[0]) for e in events if e.name == "aten::copy_" and inside_library(e)]
    for shape in set(moved):
        assert moved.count(shape) - in_library.count(shape) <= library.count(shape), shape


def _packs_a_prefix(event, weights) -> bool:
    parent = event
    while parent is not None and parent.name != "aten::contiguous":
        parent = parent.cpu_parent
    return parent is not None and tuple(parent.input_shapes[0]) not in weights


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        # The flat gradient lives through the forward passes, when a plain step has dropped its gradients; what our
        # kernels and the shared stem save makes up for it.
        ("resnet18", 1.05 if OWN_CONVOLUTIONS else 1.17),
        ("mobilenet_v2", 0.9),
    ],
)
def test_peak_memory_of_a_training_is_about_a_plain_one(name, allowed) -> None:
    torch.manual_seed(0)
    net = models.create_model(name, num_classes=100)
    images, labels = torch.randn(8, 3, 96, 96), torch.randint(0, 100, (8,))
    algo = fastslim.AutoSlim(architecture=copy.deepcopy(net), example_inputs=images[:1], seed=0)
    task = Task(net, algo, images, labels)
    ours, theirs = (peak_of_training(partial(make, task, torch.channels_last)) for make in (sandwich_side, plain_side))
    assert theirs > 50e6
    assert ours <= allowed * theirs, f"{ours / 2**20:.0f} MiB, plain step {theirs / 2**20:.0f} MiB"
