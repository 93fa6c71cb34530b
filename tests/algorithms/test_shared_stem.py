"""A step that runs the stem once equals the one whose passes run it each, in float64: gradients, losses, statistics."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import plain_loop
import pytest
import torch
from stem_cases import LABELS, SMALL, Small, assert_same_step, everything, images, listed, small, unshared
from test_exactness import assert_equal_to_rounding, gradients, make, statistics, subnets_of_next_step
from test_step_options import distiller
from torch import nn

import fastslim
from fastslim import models
from fastslim.bench import peak_bytes
from fastslim.nn import SlimConv2d

NETWORKS = {
    "resnet18": (partial(models.resnet18, 10, width_mult=0.25), partial(plain_loop.resnet18, small_images=False), 32),
    "mobilenet_v2": (
        partial(models.mobilenet_v2, 10, width_mult=0.25),
        partial(plain_loop.mobilenet_v2, small_images=False),
        32,
    ),
    "concat": (plain_loop.ConcatNet, plain_loop.concat_net, 12),  # three boundaries, two widths
    "grouped": (plain_loop.GroupedNet, plain_loop.grouped_net, 16),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_equals_the_plain_loop_and_the_step_without(name, layout, calls) -> None:
    build, forward, size = NETWORKS[name]
    torch.manual_seed(0)
    plain = build().double()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    plain, x = plain.to(memory_format=layout), images(size).to(memory_format=layout)
    algo = fastslim.AutoSlim(architecture=copy.deepcopy(plain), example_inputs=x[:1], divisor=4, seed=1)
    other, widths = unshared(algo), subnets_of_next_step(algo)
    first = next(m for m in algo.architecture.modules() if isinstance(m, SlimConv2d))
    calls.clear()
    losses = algo.accumulate((x, LABELS))
    assert calls.count(first) == 1 and len(calls) > 4
    expected = plain_loop.sandwich_passes(plain_loop.Net(plain), forward, x, LABELS, widths)
    torch.testing.assert_close(torch.stack(list(losses.values())), torch.stack(expected), rtol=0, atol=1e-12)
    assert_equal_to_rounding(gradients(algo.architecture), gradients(plain))
    assert_equal_to_rounding(statistics(algo.architecture), statistics(plain))
    assert_equal_to_rounding(everything(algo, losses), everything(other, other.accumulate((x, LABELS))))


def test_all_layers_of_a_stem_run_once_and_the_others_in_every_pass(calls) -> None:
    algo, _, x, labels = make("mobilenet_v2", torch.float64, "nhwc")
    calls.clear()
    algo.accumulate((x, labels))
    counts = {name: calls.count(m) for name, m in algo.architecture.named_modules() if isinstance(m, SlimConv2d)}
    assert {name for name, count in counts.items() if count == 1} == {"features.0.0", "features.1.conv.0.0"}
    assert {count for count in counts.values() if count != 1} == {4}


@pytest.mark.parametrize("momentum", [0.0, 0.01, 0.7, 1.0, None])
def test_running_statistics_are_those_of_all_passes(momentum) -> None:
    algo = small()
    algo.architecture.norm.momentum = momentum
    assert_same_step(algo)
    assert algo.architecture.norm.momentum == momentum
    assert int(algo.architecture.norm.num_batches_tracked) == 2 * 4


def test_running_statistics_have_a_closed_form() -> None:
    algo = small()
    norm, m = algo.architecture.norm, 0.3
    norm.momentum, old = m, norm.running_var.clone()
    widths = [w["conv"] for w in subnets_of_next_step(algo)]
    algo.accumulate((images(), LABELS))
    batch = algo.architecture.conv(images()).var((0, 2, 3)).detach()
    keep = torch.tensor(
        [(1 - m) ** sum(width > channel for width in widths) for channel in range(16)], dtype=torch.float64
    )
    torch.testing.assert_close(norm.running_var, keep * old + (1 - keep) * batch, rtol=0, atol=1e-12)
    assert len(set(widths)) > 1


def evaluate_norm(algo) -> None:
    algo.architecture.norm.eval()


def no_statistics(algo) -> None:
    algo.architecture.norm.track_running_stats = False


def freeze(*names: str):
    def change(algo) -> None:
        for name, p in algo.architecture.named_parameters():
            p.requires_grad_(not name.startswith(names))

    return change


@pytest.mark.parametrize(
    "change",
    [evaluate_norm, no_statistics, freeze("conv"), freeze("conv", "norm"), freeze("norm.bias")],
    ids=["norm in evaluation", "no statistics", "frozen convolution", "frozen stem", "frozen shift"],
)
def test_frozen_parts_of_a_stem_stay_as_they_are(change) -> None:
    algo = small()
    change(algo)
    before = {name: value.clone() for name, value in algo.architecture.norm.named_buffers()}
    assert_same_step(algo)
    if change in (evaluate_norm, no_statistics):
        assert_equal_to_rounding(dict(algo.architecture.norm.named_buffers()), before)


@pytest.mark.parametrize("options", [dict(num_samples=0), dict(num_samples=1), dict(grad_reduction="mean")], ids=str)
def test_any_number_of_passes_and_the_mean_of_them(options) -> None:
    assert_same_step(small(**options))


def test_scaled_losses_and_optimizer_steps() -> None:
    assert_same_step(small(), step=lambda algo: algo.accumulate((images(), LABELS), scale=0.25))
    algo = small()
    other = unshared(algo)
    optimizers = {id(each): torch.optim.SGD(each.parameters(), 0.1, 0.9) for each in (algo, other)}
    assert_same_step(algo, step=lambda a: a.train_step((images(), LABELS), optimizers[id(a)]), copies=other)


def test_gradients_of_the_images() -> None:
    results = []
    for algo in (small(), small(share_stem=False)):
        x = images().requires_grad_()
        algo.accumulate((x, LABELS))
        results.append(x.grad)
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("recorded", ["fc", "body", "conv", "norm", "pool"])
def test_recorded_layers_are_run_in_every_pass(recorded, calls) -> None:
    config = distiller("fc")
    for side in ("student_recorders", "teacher_recorders"):
        config[side] = {**config[side], "seen": dict(type="ModuleOutputs", source=recorded)}
    algo = small(distiller=config)
    calls.clear()
    algo.accumulate((images(), LABELS))
    assert calls.count(algo.architecture.conv) == (4 if recorded == "conv" else 1)
    assert_same_step(algo, shared=recorded != "conv")
    if recorded == "conv":
        assert "stem not shared: conv is watched by a hook or recorder" in algo.plan_report


def test_the_widest_pass_may_be_the_last_and_every_width_have_its_own_statistics(calls) -> None:
    algo = listed()
    calls.clear()
    algo.accumulate((images(), LABELS))
    widths = [subnet[next(iter(subnet))] for subnet in algo.mutator.subnets]
    assert widths[0] < widths[-1] and calls.count(algo.architecture.conv) == 1
    assert_same_step(algo)
    assert "stem shared by all passes: conv" in algo.plan_report  # its batch norm is another one in every pass


class Reversed(fastslim.AutoSlim):
    """The narrowest pass comes first."""

    def subnets_of_step(self):
        return dict(reversed(super().subnets_of_step().items()))


def test_a_narrow_first_pass_reads_the_stem_of_the_widest(calls) -> None:
    torch.manual_seed(0)
    algo = Reversed(architecture=Small().double(), example_inputs=images()[:1], divisor=4, seed=1)
    assert_same_step(algo)
    calls.clear()
    algo.accumulate((images(), LABELS))
    assert calls.count(algo.architecture.conv) == 1


class Augmented(fastslim.AutoSlim):
    """Some students see other images, or run without a gradient before."""

    def losses_of_pass(self, batch, teacher, *, first):
        self.passes = 0 if first else self.passes + 1
        if self.passes == 2:
            batch = batch._replace(inputs=batch.inputs.flip(3))
        if self.passes == 3:
            with torch.no_grad():
                self.call(self.fast_architecture, batch.inputs)
        return super().losses_of_pass(batch, teacher, first=first)


def test_passes_with_images_of_their_own_run_the_stem_themselves(calls) -> None:
    torch.manual_seed(0)
    algo = Augmented(architecture=Small().double(), example_inputs=images()[:1], divisor=4, seed=1)
    other = unshared(algo)
    for each in (algo, other):
        each.passes = 0
    calls.clear()
    losses = [each.accumulate((images(), LABELS)) for each in (algo, other)]
    assert_equal_to_rounding(everything(algo, losses[0]), everything(other, losses[1]))
    assert calls.count(algo.architecture.conv) == 3
    assert any(line.startswith("stem not shared: in the last step, a pass") for line in algo.plan_report)


class Overwriting(fastslim.AutoSlim):
    """Changes the images in place behind the first pass."""

    def losses_of_pass(self, batch, teacher, *, first):
        result = super().losses_of_pass(batch, teacher, first=first)
        if first:
            self.late = batch.inputs
        return result

    def choose_subnet(self, index, choices):
        super().choose_subnet(index, choices)
        if index == 1 and getattr(self, "late", None) is not None:
            with torch.no_grad():
                self.late += 1
            self.late = None


def test_changed_images_are_noticed(calls) -> None:
    torch.manual_seed(0)
    algo = Overwriting(architecture=Small().double(), example_inputs=images()[:1], divisor=4, seed=1)
    algo.architecture.conv.requires_grad_(False)  # whose backward pass would complain
    calls.clear()
    algo.accumulate((images(), LABELS))
    assert calls.count(algo.architecture.conv) == 4


def test_copies_and_pickles_share_their_own_stem() -> None:
    algo = small()
    for other in (copy.deepcopy(algo), pickle.loads(pickle.dumps(algo))):
        assert other._plan.stem.convs[0] is other.architecture.conv
        assert SMALL in other.plan_report
        assert_same_step(other)
    torch.testing.assert_close(algo.architecture.norm.num_batches_tracked, torch.tensor(0))


def test_verify_compares_the_shared_stem_with_the_plain_loop() -> None:
    algo, _, x, labels = make("resnet18", torch.float32, "nhwc")
    assert algo.plan_report[-1].startswith("stem shared")
    report = fastslim.verify(algo, (x, labels))
    assert report, str(report)


def test_verify_notices_gradients_of_a_pass_that_are_lost(monkeypatch) -> None:
    from fastslim.algorithms.shared_stem import _Value

    algo, _, x, labels = make("resnet18", torch.float32, "nhwc")
    add = _Value.add
    monkeypatch.setattr(_Value, "add", lambda value, g: add(value, g) if g.shape == value.tensor.shape else None)
    assert not fastslim.verify(algo, (x, labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_err_no_more_than_passes_of_their_own(dtype) -> None:
    algo = small()
    truth = unshared(algo)
    truth.accumulate((images(), LABELS))
    low = [algo.float(), unshared(algo.float())]
    with torch.autocast("cpu", dtype):
        for each in low:
            each.accumulate((images().float(), LABELS))
    errors = []
    for each in low:
        of_stem = [(getattr(each.architecture, n), getattr(truth.architecture, n)) for n in ("conv", "norm")]
        pairs = [(a.weight.grad.double(), b.weight.grad) for a, b in of_stem]
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in pairs))
    assert errors[0] <= 2 * errors[1] + 16 * torch.finfo(dtype).eps
    assert errors[0] < 0.1


def test_the_step_on_the_meta_device() -> None:
    algo = small().to("meta")
    algo.accumulate((images().to("meta"), LABELS.to("meta")))
    assert SMALL in algo.plan_report


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_shared_stem_needs_no_more_memory(name) -> None:
    peaks = []
    x = torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last)
    for share_stem in (True, False):
        torch.manual_seed(0)
        net = models.create_model(name, num_classes=10)
        algo = fastslim.AutoSlim(architecture=net, example_inputs=x[:1], seed=0, share_stem=share_stem)
        algo = algo.to(memory_format=torch.channels_last)
        algo.accumulate((x, torch.arange(8)))
        peaks.append(peak_bytes(partial(algo.accumulate, (x, torch.arange(8)))))
    assert peaks[0] > 5e6
    assert peaks[0] <= 1.01 * peaks[1]
