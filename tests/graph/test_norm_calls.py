"""Batch norms with a forward of their own: slimmed, calibrated and exported as ordinary ones are."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastslim


class NormAct(nn.BatchNorm2d):
    """Batch norm and activation in one class, as several model collections have it."""

    def forward(self, x):
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        tracked = not self.training or self.track_running_stats
        x = F.batch_norm(
            x,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            factor,
            self.eps,
        )
        return F.relu(x)


class Net(nn.Module):
    """Behind a concat, so that the active channels are two segments."""

    def __init__(self, left=16, right=24, middle=8, norm=NormAct):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, left, 3), nn.Conv2d(3, right, 3)
        self.norm, self.mix = norm(left + right), nn.Conv2d(left + right, middle, 1)
        self.last, self.head = norm(middle), nn.Linear(middle, 5)

    def forward(self, x):
        x = self.norm(torch.cat([self.left(x), self.right(x)], 1))
        return self.head(self.last(self.mix(x)).mean((2, 3)))


WIDTHS = {"left_(0, 16)_16": 4, "right_(0, 24)_24": 6, "mix_(0, 8)_8": 2}


def make():
    torch.manual_seed(0)
    net = Net().double()
    for norm in (net.norm, net.last):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, 0, 1)
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    algo = fastslim.AutoSlim(architecture=net, example_inputs=x, divisor=1, choices=[0.25, 0.5, 1])
    return net, algo, x


def narrow_copy(net):
    """The same network built with plain layers of that size."""
    small = Net(4, 6, 2).double()
    rows = torch.cat([torch.arange(4), torch.arange(16, 22)])
    with torch.no_grad():
        for name in ("left", "right", "last"):
            for own, full in zip(
                getattr(small, name).state_dict().values(), getattr(net, name).state_dict().values(), strict=True
            ):
                own.copy_(full[: len(own)] if own.dim() else full)
        for own, full in zip(small.norm.state_dict().values(), net.norm.state_dict().values(), strict=True):
            own.copy_(full[rows] if own.dim() else full)
        small.mix.weight.copy_(net.mix.weight[:2, rows])
        small.mix.bias.copy_(net.mix.bias[:2])
        small.head.weight.copy_(net.head.weight[:, :2])
        small.head.bias.copy_(net.head.bias)
    return small


@pytest.mark.parametrize("training", [True, False])
def test_narrow_network_and_its_statistics_equal_the_one_built_by_hand(training):
    net, algo, x = make()
    small = narrow_copy(net).train(training)
    algo.mutator.set_choices(WIDTHS)
    net.train(training)
    before = net.norm.running_mean.clone()
    torch.testing.assert_close(net(x), small(x), rtol=1e-12, atol=1e-12)
    rows = torch.cat([torch.arange(4), torch.arange(16, 22)])
    torch.testing.assert_close(net.norm.running_mean[rows], small.norm.running_mean)
    torch.testing.assert_close(net.norm.running_var[rows], small.norm.running_var)
    others = torch.tensor([i for i in range(40) if i not in rows])
    assert torch.equal(net.norm.running_mean[others], before[others])


def test_train_step_equals_that_of_ordinary_batch_norm_and_relu():
    net, algo, x = make()
    ordinary = Net(norm=lambda n: nn.Sequential(nn.BatchNorm2d(n), nn.ReLU())).double()
    state = {k.replace("norm.", "norm.0.").replace("last.", "last.0."): v for k, v in net.state_dict().items()}
    ordinary.load_state_dict(state)
    other = fastslim.AutoSlim(architecture=ordinary, example_inputs=x, divisor=1, choices=[0.25, 0.5, 1])
    labels = torch.arange(6) % 5
    for each in (algo, other):
        each.mutator.rng.seed(1)
        each.train_step((x, labels), torch.optim.SGD(each.parameters(), 0.1))
    for key, value in net.state_dict().items():
        key = key.replace("norm.", "norm.0.").replace("last.", "last.0.")
        torch.testing.assert_close(ordinary.state_dict()[key], value, rtol=1e-9, atol=1e-9)


def test_calibrated_statistics_are_used_at_every_width_and_exported():
    net, algo, x = make()
    subnets = [WIDTHS, algo.mutator.max_choices]
    fastslim.calibrate_batch_norm(algo, [(x, None)], subnets)
    algo.eval()
    for subnet in subnets:
        algo.set_subnet(subnet)
        small = narrow_copy(net) if subnet is WIDTHS else copy.deepcopy(Net().double())
        if subnet is not WIDTHS:
            small.load_state_dict(net.state_dict())
        for norm in (small.norm, small.last):
            norm.momentum = 1.0
        small.train()(x)  # leaves the batch's own statistics in the running ones
        expected = small.eval()(x)
        torch.testing.assert_close(algo(x), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fastslim.export_subnet(algo, subnet).eval()(x), expected, rtol=1e-9, atol=1e-9)


def test_exported_networks_train_like_the_one_built_by_hand():
    net, algo, x = make()
    small = narrow_copy(net).train()
    exported = fastslim.export_subnet(algo, WIDTHS).train()
    for _ in range(2):
        torch.testing.assert_close(exported(x), small(x), rtol=1e-12, atol=1e-12)
    for key, value in small.state_dict().items():
        torch.testing.assert_close(exported.state_dict()[key], value, rtol=1e-12, atol=1e-12)
    assert exported.norm.num_batches_tracked == 2
    torch.testing.assert_close(exported.eval()(x), small.eval()(x), rtol=1e-12, atol=1e-12)
    assert exported.norm.num_batches_tracked == 2
