"""The fast step on networks of all kinds equals the passes one after another with ordinary autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from graph.zoo import ZOO, make

import fastslim

NAMES = ["ViT", "FusedQKV", "Swin", "ConvNeXt", "Subclassed", "C2f", "ShuffleV2", "LeNet", "Conv3d", "Shared"]


@pytest.mark.parametrize("name", NAMES)
def test_step_equals_passes_with_ordinary_gradients(name):
    model, inputs = make(name)
    batch = dict(inputs) if isinstance(inputs, dict) else inputs
    assert not isinstance(batch, dict) and len(batch) == 1
    fast = fastslim.AutoSlim(
        architecture=model, example_inputs=batch, choices=[0.25, 0.5, 0.75, 1], divisor=1, seed=0
    ).train()
    x = batch[0]
    with torch.no_grad():
        samples, classes = fast.architecture(x).shape
    labels = torch.arange(samples) % classes
    plain = copy.deepcopy(fast)
    torch.manual_seed(0)  # of dropout
    fast.accumulate((x, labels))

    torch.manual_seed(0)
    net, mutator = plain.architecture, plain.mutator
    mutator.set_max_choices()
    teacher = net(x)
    F.cross_entropy(teacher, labels).backward()
    soft = F.softmax(teacher.detach(), 1)
    for choices in (mutator.min_choices, mutator.sample_choices(), mutator.sample_choices()):
        mutator.set_choices(choices)
        F.kl_div(F.log_softmax(net(x), 1), soft, reduction="batchmean").backward()
    for (key, ours), theirs in zip(fast.architecture.named_parameters(), net.parameters(), strict=True):
        expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        got = torch.zeros_like(ours) if ours.grad is None else ours.grad
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")
    for (key, ours), theirs in zip(fast.architecture.named_buffers(), net.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


def test_the_names_are_of_the_zoo():
    assert set(NAMES) <= set(ZOO)
