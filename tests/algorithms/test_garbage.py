"""Python's garbage collector is kept out of the passes and comes back after them."""

import gc

import pytest
import torch
from torch import nn

import fastslim
from fastslim.algorithms.garbage import collection_postponed


@pytest.fixture(autouse=True)
def collector():
    yield gc.enable()
    gc.enable()


def test_the_collector_rests_during_the_passes_and_comes_back():
    seen = []
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Linear(16, 4))
    images = torch.randn(4, 3, 8, 8)
    algo = fastslim.AutoSlim(architecture=net, example_inputs=images[:1])
    algo.architecture.register_forward_hook(lambda *_: seen.append(gc.isenabled()))
    algo.make_plan(fuse=False)
    algo.train_step((images, torch.tensor([0, 1, 2, 3])), torch.optim.SGD(algo.parameters(), lr=0.1))
    assert seen and not any(seen)
    assert gc.isenabled()


def test_a_collector_that_is_off_stays_off_and_an_error_brings_it_back():
    gc.disable()
    with collection_postponed():
        assert not gc.isenabled()
    assert not gc.isenabled()
    gc.enable()
    with pytest.raises(ValueError), collection_postponed():
        raise ValueError
    assert gc.isenabled()
