"""What a step does differently on a GPU, run on the CPU: gradients collected, weights packed, nothing waited for."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import fastslim
from fastslim import errors, models
from fastslim.algorithms import sandwich_step
from fastslim.ops import use_backend
from fastslim.ops.step_buffers import StepBuffers
from fastslim.ops.weight_cache import pack_each

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1, 2, 3, 4])


class Mixed(nn.Module):
    """A concat (segments), a layer called twice, layers that are not slim, a bias before the loss."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.left, self.right = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1, stride=1)
        self.twice = nn.Conv2d(16, 16, 3, padding=1)
        self.join = nn.Conv2d(32, 24, 3, stride=2, padding=1)
        self.scale = nn.Parameter(torch.ones(24, 1, 1))
        self.fc = nn.Linear(24, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        x = torch.relu(self.join(torch.cat([self.left(x), self.right(x)], 1))) * self.scale
        return self.fc(x.mean((2, 3)))


NETWORKS = {
    "mixed": Mixed,
    "resnet18": functools.partial(models.resnet18, num_classes=10, small_images=True),
    "mobilenet_v2": functools.partial(models.mobilenet_v2, num_classes=10, small_images=True, width_mult=0.5),
}


def algorithm(name, dtype=torch.float64, **options):
    torch.manual_seed(0)
    net = NETWORKS[name]().to(dtype)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return fastslim.AutoSlim(architecture=net, example_inputs=IMAGES[:1].to(dtype), seed=3, **options)


def train(algo, steps=2, images=None, channels_last=False):
    """State after a few steps and the losses of the last one."""
    images = IMAGES if images is None else images
    images = images.to(next(algo.parameters()).dtype)
    if channels_last:
        images, algo = images.to(memory_format=torch.channels_last), algo.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(algo.parameters(), lr=0.01, momentum=0.9)
    for _ in range(steps):
        losses = algo.train_step((images, LABELS), optimizer)
    return {**algo.state_dict(), **{f"loss.{name}": value for name, value in losses.items()}}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(sandwich_step, "StepBuffers", functools.partial(StepBuffers, collect=True))


@pytest.fixture
def packed(monkeypatch):
    """How many transfers the weight cache wanted each time."""
    calls = []
    monkeypatch.setattr(
        "fastslim.ops.weight_cache.pack_each",
        lambda transfers: (calls.append(len(transfers)), pack_each(transfers)),
    )
    return calls


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("name", NETWORKS)
def test_collected_gradients_are_those_added_one_by_one(name, request):
    expected = train(algorithm(name))
    request.getfixturevalue("as_on_a_gpu")
    assert_equal(train(algorithm(name)), expected)


def test_packed_weights_give_the_same_bits(request):
    # The library computes as on a GPU; the CPU's own kernels read the weights themselves.
    with use_backend("library"), torch.autocast("cpu", torch.bfloat16):
        expected = train(algorithm("mixed", torch.float32), channels_last=True)
        request.getfixturevalue("as_on_a_gpu")
        calls = request.getfixturevalue("packed")
        assert_equal(train(algorithm("mixed", torch.float32), channels_last=True), expected)
    assert len(calls) == 2 * (1 + 4)  # in each step all casts, and then the parts that each pass reads
    begin, of_max, of_min = (calls[i::5] for i in range(3))
    assert begin[0] == 0 and begin[1] >= 8  # nothing is known to be cast in the first step
    assert of_max == [0, 0] and min(of_min) == 5  # at full width everything lies there as it is


def test_weights_are_not_packed_for_images_in_another_layout(as_on_a_gpu, packed):
    train(algorithm("mixed", torch.float32), steps=1)
    assert packed == [0]  # what was cast in the step before


def test_passes_accumulate_over_batches(request):
    def gradients():
        algo = algorithm("mixed")
        for part in (slice(0, 2), slice(2, 4)):
            algo.accumulate((IMAGES[part].double(), LABELS[part]), scale=0.5)
        return {name: p.grad.clone() for name, p in algo.named_parameters()}

    expected = gradients()
    request.getfixturevalue("as_on_a_gpu")
    assert_equal(gradients(), expected)


@pytest.mark.parametrize("failing_pass", [0, 2])
def test_an_error_in_a_pass_leaves_everything_as_before(as_on_a_gpu, failing_pass, monkeypatch):
    algo = algorithm("mixed", torch.float32)
    train(algo, steps=1)
    before = {name: value.clone() for name, value in algo.state_dict().items()}
    calls = iter(range(100))
    inner = algo.losses_of_pass

    def out_of_memory(*args, **kwargs):
        if next(calls) == failing_pass:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(*args, **kwargs)

    monkeypatch.setattr(algo, "losses_of_pass", out_of_memory)
    optimizer = torch.optim.SGD(algo.parameters(), lr=0.01)
    with pytest.raises(torch.OutOfMemoryError):
        algo.train_step((IMAGES, LABELS), optimizer)
    assert_equal(algo.state_dict(), before)
    assert all(p.grad is None for p in algo.parameters())
    monkeypatch.undo()
    losses = algo.train_step((IMAGES, LABELS), optimizer)  # and the next step works
    assert all(value.isfinite() for value in losses.values())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_step_never_asks_the_device_for_a_value(name):
    """On the meta device there are no values: `.item()`, `.cpu()`, `nonzero()` and comparisons in Python fail."""
    algo = algorithm(name, torch.float32).to("meta")
    optimizer = torch.optim.SGD(algo.parameters(), lr=0.1, momentum=0.9)
    images, labels = IMAGES.to("meta").to(memory_format=torch.channels_last), LABELS.to("meta")
    for _ in range(2):
        losses = algo.train_step((images, labels), optimizer)
    assert set(losses) == {
        "max_subnet.loss",
        "min_subnet.loss_kl",
        "random_subnet_0.loss_kl",
        "random_subnet_1.loss_kl",
    }
    assert all(p.grad.shape == p.shape for p in algo.parameters())


def test_a_step_inside_a_capture_is_refused(monkeypatch):
    algo = algorithm("mixed", torch.float32)
    monkeypatch.setattr(sandwich_step, "is_capturing", lambda: True)
    with pytest.raises(errors.FastslimRuntimeError, match="cuda_graphs=True"):
        train(algo, steps=1)
