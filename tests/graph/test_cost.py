"""The analytic cost equals a count with hooks on a plain network built at the same widths."""

import copy
import time

import pytest
import torch
from torch import nn
from zoo import CLASSIC, make

from fastslim import models
from fastslim.errors import FastslimValueError
from fastslim.graph import Cost, count_cost, trace
from fastslim.mutators import OneShotChannelMutator

UNIT = dict(
    type="OneShotMutableChannelUnit",
    default_args=dict(candidate_choices=[0.25, 0.5, 0.75, 1.0], choice_mode="ratio", divisor=4),
)


def plain_network(model, mutator, inputs):
    """A network of plain layers as large as the tensors that reach the slim ones."""
    sizes = {}

    def remember(name):
        def hook(module, args, out):
            sizes[name] = (args[0].shape, out.shape)

        return model.get_submodule(name).register_forward_hook(hook)

    hooks = [remember(name) for name in mutator.layers]
    model(*inputs)
    for hook in hooks:
        hook.remove()
    plain = copy.deepcopy(model)
    for name, (before, after) in sizes.items():
        old = model.get_submodule(name)
        if isinstance(old, nn.Linear):
            new = nn.Linear(before[-1], after[-1], bias=old.bias is not None)
        elif isinstance(old, nn.BatchNorm2d):
            new = nn.BatchNorm2d(before[1])
        else:
            groups = old.groups * before[1] // old.in_channels if old.groups > 1 else 1
            new = nn.Conv2d(
                before[1],
                after[1],
                old.kernel_size,
                old.stride,
                old.padding,
                old.dilation,
                groups,
                old.bias is not None,
            )
        holder, _, key = name.rpartition(".")
        setattr(plain.get_submodule(holder), key, new.double())
    return plain


def counted(model, inputs):
    """Multiply-adds of one sample, by running the network."""
    total = 0

    def count(module, args, out):
        nonlocal total
        per_output = module.weight[0].numel()
        total += out[0].numel() * per_output

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    model(*inputs)
    for hook in hooks:
        hook.remove()
    return Cost(total, sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize("name", CLASSIC)
def test_cost_equals_a_count_on_a_plain_network_of_these_widths(name):
    model, inputs = make(name)
    mutator = OneShotChannelMutator(UNIT, example_inputs=inputs, seed=5)
    mutator.prepare_from_supernet(model.eval())
    for choices in (mutator.max_choices, mutator.min_choices, mutator.sample_choices(), mutator.sample_choices()):
        mutator.set_choices(choices)
        assert count_cost(mutator.trace, choices) == counted(plain_network(model, mutator, inputs), inputs)


@pytest.mark.parametrize(
    ("name", "multiply_adds", "parameters"),
    [
        ("resnet18", 1_814_073_344, 11_689_512),
        ("resnet50", 4_089_184_256, 25_557_032),
        ("mobilenet_v2", 300_774_272, 3_504_872),
    ],
)
def test_full_networks_cost_what_torchvision_publishes(name, multiply_adds, parameters):
    with torch.device("meta"):
        model = getattr(models, name)()
    assert count_cost(trace(model, (1, 3, 224, 224)), {}) == Cost(multiply_adds, parameters)


def test_other_parameters_count_in_full():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.PReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(2), nn.LayerNorm(16))
    found = trace(model, (1, 3, 4, 4))
    assert count_cost(found, {found.units[0].name: 2}).parameters == (3 * 2 + 2) + 1 + (2 * 4 + 4) + 32


def test_unknown_unit_names_the_nearest():
    model, inputs = make("Residual")
    with pytest.raises(FastslimValueError, match=r"did you mean 'a.0_\(0, 24\)_24'"):
        count_cost(trace(model, inputs), {"a.0_(0, 24)": 8})


def test_counting_takes_microseconds_per_layer():
    model, inputs = make("Residual")
    found = trace(model, inputs)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        count_cost(found, {})
        times.append(time.perf_counter() - start)
    assert min(times) / len(found.layers) < 50e-6
