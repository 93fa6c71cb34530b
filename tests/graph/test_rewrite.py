"""Forwards that a width changes: right at every width and in both modes, copied, compiled and hooked like others."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from rewritten_nets import RATIOS, Net, assert_is_narrow, converted, image, narrow
from torch import nn

import fastslim
from fastslim.graph.rewrite import RewrittenForward


def test_narrow_widths_run_a_rewritten_forward():
    model, plain = converted(Net())
    forward = vars(model.scaled)["forward"]
    assert isinstance(forward, RewrittenForward) and forward.narrow
    assert model._fastslim_mutator.current_choices == {"first_(0, 8)_8": 1}
    assert_is_narrow(model, plain, image(2, 3, 8, 8))


def test_full_width_runs_the_users_own_forward():
    calls = []

    def function(s, x):
        calls.append(x.shape)
        return x.view(-1, s.c, 8, 8) * s.scale

    model, plain = converted(Net(function=function))
    model._fastslim_mutator.set_max_choices()
    calls.clear()
    x = image(2, 3, 8, 8)
    assert torch.equal(model(x), plain(x))
    assert len(calls) == 2
    model._fastslim_mutator.set_min_choices()
    model(x)
    assert len(calls) == 2


def test_attributes_changed_after_conversion_count_at_full_width():
    model, _ = converted(Net(function=lambda s, x: x.view(-1, s.c, 8, 8) * s.scale * getattr(s, "gain", 1)))
    model._fastslim_mutator.set_max_choices()
    x = image(2, 3, 8, 8)
    before = model(x) - model.last.bias.view(-1, 1, 1)
    model.scaled.gain = 2
    torch.testing.assert_close(model(x) - model.last.bias.view(-1, 1, 1), 2 * before)


class Modes(nn.Module):
    """Dropout and a branch by mode, in a forward that narrow widths change."""

    def __init__(self, c=8):
        super().__init__()
        self.c = c
        self.first, self.last = nn.Conv2d(3, c, 3, padding=1), nn.Conv2d(c, 4, 1)
        self.scale = nn.Parameter(torch.randn(c, 1, 1))

    def forward(self, x):
        x = F.dropout(self.first(x) * self.scale, 0.5, training=self.training)
        if self.training:
            x = x.view(x.shape[0], self.c, -1).flip(-1).view_as(x)
        return self.last(x)


@pytest.mark.parametrize("training", [False, True])
def test_every_mode_has_its_own(training):
    model, plain = converted(Modes())
    c = model._fastslim_mutator.current_choices["first_(0, 8)_8"]
    small = Modes(c).double()
    full = plain.state_dict()
    small.load_state_dict({k: full[k][tuple(slice(n) for n in v.shape)] for k, v in small.state_dict().items()})
    x = image(2, 3, 8, 8)
    outputs = []
    for module in (model, small):
        torch.manual_seed(5)
        outputs.append(module.train(training)(x))
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
@pytest.mark.parametrize("ran", [False, True])
def test_copies_bring_their_forward(copied, ran):
    model, plain = converted(Net())
    x = image(2, 3, 8, 8)
    if ran:
        model(x)
    twin = copied(model)
    assert vars(twin.scaled)["forward"].module is twin.scaled
    with torch.no_grad():
        twin.scaled.scale.mul_(2)
        plain.scaled.scale.mul_(2)
    assert_is_narrow(twin, plain, x)
    twin._fastslim_mutator.set_choices({"first_(0, 8)_8": 5})
    assert_is_narrow(twin, plain, x)
    assert model._fastslim_mutator.current_choices["first_(0, 8)_8"] == 1


def test_compiled_models_run_it():
    model, plain = converted(Net())
    x = image(2, 3, 8, 8)
    compiled = torch.compile(model, backend="aot_eager")
    for choices in ({"first_(0, 8)_8": 1}, {"first_(0, 8)_8": 6}, {"first_(0, 8)_8": 8}):
        model._fastslim_mutator.set_choices(choices)
        torch.testing.assert_close(compiled(x), narrow(model, plain)(x), rtol=1e-10, atol=1e-10)


class OwnNorm(nn.BatchNorm2d):
    """A batch norm with a forward of its own."""

    def forward(self, x):
        self.num_batches_tracked.add_(1)
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
            with torch.no_grad():
                self.running_mean.mul_(0.9).add_(mean, alpha=0.1)
                self.running_var.copy_(0.9 * self.running_var + 0.1 * var)
        else:
            mean, var = self.running_mean, self.running_var
        x = (x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + self.eps).sqrt()
        return x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class Counted(nn.Module):
    """A buffer of one number per channel, updated in place, behind one layer or two side by side."""

    def __init__(self, a=4, b=6, kind=OwnNorm):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, a, 1), nn.Conv2d(3, b, 1)
        self.norm, self.last = kind(a + b), nn.Conv2d(a + b, 4, 1)
        self.alone = kind(4)

    def forward(self, x):
        return self.alone(self.last(self.norm(torch.cat([self.one(x), self.two(x)], 1))))


@pytest.mark.parametrize("training", [True, False])
def test_buffers_updated_in_place_reach_the_module(training):
    """The active channels' entries change as a narrow network's do, all others stay."""
    torch.manual_seed(0)
    model = Counted().double()
    with torch.no_grad():
        for tensor in (*model.norm.parameters(), model.norm.running_mean, model.norm.running_var):
            tensor.uniform_(0.5, 1.5)
    plain = copy.deepcopy(model)
    mutator = fastslim.convert(model, (2, 3, 4, 4), choices=RATIOS, divisor=1).mutator
    mutator.set_choices({"one_(0, 4)_4": 3, "two_(0, 6)_6": 2})
    kept = [0, 1, 2, 4, 5]
    small = Counted(3, 2).double()
    with torch.no_grad():
        for key, value in small.state_dict().items():
            source = plain.state_dict()[key]
            if key.startswith("norm") and source.dim():
                source = source[kept]
            elif key == "last.weight":
                source = source[:, kept]
            elif key.startswith(("one", "two")):
                source = source[: len(value)]
            value.copy_(source)
    for _ in range(2):
        x = image(4, 3, 4, 4)
        ours, theirs = model.train(training)(x), small.train(training)(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for key in ("running_mean", "running_var"):
        expected = getattr(plain.norm, key).clone()
        expected[kept] = getattr(small.norm, key)
        torch.testing.assert_close(getattr(model.norm, key), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(getattr(model.alone, key), getattr(small.alone, key), rtol=1e-10, atol=1e-10)
    assert model.norm.num_batches_tracked == small.norm.num_batches_tracked == 2


def test_hooks_run_around_it():
    model, plain = converted(Net())
    seen = []
    model.scaled.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    model.scaled.register_forward_hook(lambda m, args, result: result * 2)
    plain.scaled.register_forward_hook(lambda m, args, result: result * 2)
    small = narrow(model, plain)
    small.scaled.register_forward_hook(lambda m, args, result: result * 2)
    x = image(2, 3, 8, 8)
    torch.testing.assert_close(model(x), small(x), rtol=1e-10, atol=1e-10)
    assert seen == [1]


def test_state_dict_and_gradients_are_full_size():
    model, plain = converted(Net())
    assert model.state_dict().keys() == plain.state_dict().keys()
    model(image(2, 3, 8, 8)).square().sum().backward()
    gradient = model.scaled.scale.grad
    assert gradient.shape == (8, 1, 1) and gradient[0].all() and not gradient[1:].any()
