"""The step on a real GPU: no waiting for the device, no weight-size allocations, graphs and streams give the same."""

from __future__ import annotations

import pytest
import torch
from test_sandwich_step import NETWORKS, algorithm

import fastslim
from fastslim import errors, models

pytestmark = pytest.mark.gpu
BATCH = 8


def on_gpu(name="mixed", size=64, **options):
    """An algorithm, a batch and an optimizer on the GPU, in channels_last."""
    algo = algorithm(name, torch.float32, **options).cuda().to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, size, size, generator=generator).cuda().to(memory_format=torch.channels_last)
    labels = torch.arange(BATCH, device="cuda") % 10
    return algo, (images, labels), torch.optim.SGD(algo.parameters(), lr=0.01, momentum=0.9)


def train(steps=2, precision=None, **options):
    algo, batch, optimizer = on_gpu(**options)
    with torch.autocast("cuda", precision, enabled=precision is not None):
        for _ in range(steps):
            losses = algo.train_step(batch, optimizer)
    return {**algo.state_dict(), **losses}, algo


def assert_close(state, expected, tolerance):
    for name, value in expected.items():
        torch.testing.assert_close(
            state[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mixed", "resnet18", "mobilenet_v2"])
def test_a_step_does_not_wait_for_the_device(name, precision):
    algo, batch, optimizer = on_gpu(name)
    with torch.autocast("cuda", precision, enabled=precision is not None):
        for _ in range(2):
            algo.train_step(batch, optimizer)
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses = algo.train_step(batch, optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(bool(value.isfinite()) for value in losses.values())


@pytest.mark.parametrize("name", ["mixed", "mobilenet_v2"])
def test_losses_and_state_are_those_of_the_cpu(name):
    ours, _ = train(name=name, steps=1)
    algo, (images, labels), _ = on_gpu(name)
    algo = algo.cpu()
    optimizer = torch.optim.SGD(algo.parameters(), lr=0.01, momentum=0.9)
    losses = algo.train_step((images.cpu(), labels.cpu()), optimizer)
    expected = {**algo.state_dict(), **losses}
    assert_close({name: value.cpu() for name, value in ours.items()}, expected, 2e-3)


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [dict(overlap_students=True), dict(cuda_graphs=True)], ids=str)
def test_streams_and_graphs_give_what_passes_one_by_one_give(options, precision):
    torch.backends.cudnn.deterministic = True
    try:
        # With these options passes are whole ones.
        expected, _ = train(steps=6, precision=precision, name="resnet18", share_stem=False)
        state, algo = train(steps=6, precision=precision, name="resnet18", **options)
    finally:
        torch.backends.cudnn.deterministic = False
    assert_close(state, expected, 1e-5 if precision is None else 2e-2)
    if "cuda_graphs" in options:
        assert [line.split(":")[0] for line in algo.graph_report] == ["max_subnet", "min_subnet"], algo.graph_report


def test_nothing_of_the_weights_size_is_allocated(monkeypatch):
    """A step's peak is that of one pass and its gradients: weights of 64 MB, activations of a few."""

    def wide():
        layers = [torch.nn.Conv2d(3, 1024, 3, stride=8, bias=False), torch.nn.ReLU()]
        layers += [torch.nn.Conv2d(1024, 1024, 3, padding=1, bias=False), torch.nn.ReLU()]
        return torch.nn.Sequential(
            *layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(1024, 10)
        )

    monkeypatch.setitem(NETWORKS, "wide", wide)
    algo, batch, optimizer = on_gpu("wide", size=16)
    for _ in range(3):
        algo.train_step(batch, optimizer)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    algo.train_step(batch, optimizer)
    weight = 1024 * 1024 * 9 * 4
    assert torch.cuda.max_memory_allocated() - before < 1.9 * weight  # cuDNN's weight gradient of one pass, workspaces


def test_running_out_of_memory_leaves_the_state_usable(monkeypatch):
    algo, batch, optimizer = on_gpu("resnet18")
    algo.train_step(batch, optimizer)
    before = {name: value.clone() for name, value in algo.state_dict().items()}
    inner, calls = algo.losses_of_pass, iter(range(100))

    def hungry(*args, **kwargs):
        result = inner(*args, **kwargs)
        if next(calls) == 2:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return result

    monkeypatch.setattr(algo, "losses_of_pass", hungry)
    with pytest.raises(torch.OutOfMemoryError):
        algo.train_step(batch, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in algo.state_dict().items())
    monkeypatch.undo()
    assert all(bool(value.isfinite()) for value in algo.train_step(batch, optimizer).values())


def test_a_step_inside_a_capture_is_refused():
    algo, batch, optimizer = on_gpu()
    algo.train_step(batch, optimizer)
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            with pytest.raises(errors.FastslimRuntimeError, match="cuda_graphs=True"):
                algo.train_step(batch, optimizer)
        finally:
            graph.capture_end()


def test_an_odd_width_under_bf16_is_a_slower_path_and_no_error():
    net = models.mobilenet_v2(num_classes=10, small_images=True, width_mult=0.5)
    algo = fastslim.AutoSlim(
        architecture=net, example_inputs=torch.randn(1, 3, 32, 32), choices=[0.3, 0.55, 0.8, 1.0], divisor=1, seed=0
    )
    algo = algo.cuda().to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(algo.parameters(), lr=0.01)
    with torch.autocast("cuda", torch.bfloat16):
        losses = algo.train_step((images, torch.arange(4, device="cuda")), optimizer)
    assert all(bool(value.isfinite()) for value in losses.values())
