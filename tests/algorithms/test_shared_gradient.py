"""A residual block's two gradients of its input are added by the convolution's kernel, and are what they were."""

import copy

import pytest
import torch
from torch import nn

import fastslim
from fastslim import models
from fastslim.graph import pairs

IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
LABELS = torch.tensor([1, 2, 3, 4])


def blocks():
    torch.manual_seed(0)
    return models.resnet18(num_classes=8)


def gradients(net, *, shared, monkeypatch, calls=None, dtype=torch.float32):
    with monkeypatch.context() as patch:
        if not shared:
            patch.setattr(pairs, "_share_gradient", lambda *_: None)
        images = IMAGES.to(dtype)
        algo = fastslim.AutoSlim(architecture=copy.deepcopy(net).to(dtype), example_inputs=images[:1], seed=0)
        algo = algo.to(memory_format=torch.channels_last)
        if calls is not None:
            op = torch.ops.fastslim.slim_conv2d_backward_input_add_cpp
            patch.setattr(op, "default", lambda *call, real=op.default: (calls.append(call[2].shape), real(*call))[1])
        algo.accumulate((images, LABELS))
    return {name: p.grad for name, p in algo.named_parameters()}


def test_every_block_without_a_shortcut_shares_in_every_pass(monkeypatch):
    if "avx512" not in fastslim._ext.BUILD["cpu_isa"]:
        pytest.skip("the convolution's C++ kernels are chosen with AVX-512 only")
    calls = []
    gradients(blocks(), shared=True, monkeypatch=monkeypatch, calls=calls)
    assert len(calls) == 5 * 4  # layer1's two blocks and the second of the others, in four passes


def test_the_gradients_are_as_exact_as_without(monkeypatch):
    net = blocks()
    exact = gradients(net, shared=False, monkeypatch=monkeypatch, dtype=torch.float64)
    alone = gradients(net, shared=False, monkeypatch=monkeypatch)
    shared = gradients(net, shared=True, monkeypatch=monkeypatch)

    def error(mine):
        scale = {name: float(g.norm()) + 1e-12 for name, g in exact.items()}
        return torch.tensor([float((mine[name].double() - g).norm()) / scale[name] for name, g in exact.items()])

    assert float(error(shared).median()) < 2 * float(error(alone).median()) + 1e-7


class Detaching(nn.Module):
    """A block whose path is cut: its end's backward is not followed by its beginning's."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.first, self.norm1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.last, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.entry, self.norm3 = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 8)

    def forward(self, x):
        x = torch.relu(self.norm0(self.stem(x)))
        x = torch.relu(self.norm3(self.entry(x)))
        y = torch.relu(self.norm1(self.first(x))).detach()
        x = torch.relu(self.norm2(self.last(y)) + x)
        return self.head(x.mean((2, 3)))


def test_a_path_that_is_cut_loses_nothing(monkeypatch):
    torch.manual_seed(0)
    net = Detaching()
    alone = gradients(net, shared=False, monkeypatch=monkeypatch)
    shared = gradients(net, shared=True, monkeypatch=monkeypatch)
    assert float(shared["architecture.entry.weight"].abs().max()) > 0
    for name, gradient in alone.items():
        assert (gradient is None) == (shared[name] is None)
        if gradient is not None:
            torch.testing.assert_close(shared[name], gradient)


def test_a_hook_that_cuts_the_path_loses_nothing(monkeypatch):
    def net():
        torch.manual_seed(0)
        return models.resnet50(num_classes=8)  # three convolutions a block: one between beginning and end

    def step(shared):
        with monkeypatch.context() as patch:
            if not shared:
                patch.setattr(pairs, "_share_gradient", lambda *_: None)
            algo = fastslim.AutoSlim(architecture=net(), example_inputs=IMAGES[:1], seed=0)
        algo = algo.to(memory_format=torch.channels_last)
        algo.architecture.layer2[1].conv2.register_forward_hook(lambda module, inputs, output: output.detach())
        algo.accumulate((IMAGES, LABELS))
        return dict(algo.named_parameters())

    alone, shared = step(False), step(True)
    assert alone["architecture.layer2.1.conv1.weight"].grad is None
    assert alone["architecture.layer2.0.conv2.weight"].grad is not None
    for name, parameter in alone.items():
        if parameter.grad is None:
            assert shared[name].grad is None
        else:  # rounding moves activations over their kinks; a lost gradient would be most of it
            assert float((shared[name].grad - parameter.grad).norm()) <= 0.05 * float(parameter.grad.norm())
