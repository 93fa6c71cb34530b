"""The fast step equals the plain loop: losses, every gradient, every running statistic, the weights after 3 steps."""

from __future__ import annotations

import copy
import statistics as statistics_module
from functools import partial

import plain_loop
import pytest
import torch
from torch import Tensor, nn

import fastslim
from fastslim import models

NETWORKS = {
    "resnet18": (partial(models.resnet18, 10, small_images=True, width_mult=0.25), plain_loop.resnet18, 12),
    "mobilenet_v2": (partial(models.mobilenet_v2, 10, small_images=True, width_mult=0.25), plain_loop.mobilenet_v2, 12),
    "concat": (plain_loop.ConcatNet, plain_loop.concat_net, 12),
    "grouped": (plain_loop.GroupedNet, plain_loop.grouped_net, 16),
}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def make(name: str, dtype: torch.dtype, layout: str, **options) -> tuple[fastslim.AutoSlim, nn.Module, Tensor, Tensor]:
    """The algorithm, an untouched plain copy of its network, images and labels."""
    build, _, size = NETWORKS[name]
    torch.manual_seed(0)
    plain = build().to(dtype)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):  # nothing at its default may hide a mistake
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = plain.to(memory_format=LAYOUTS[layout])
    images = torch.randn(6, 3, size, size, dtype=dtype).to(memory_format=LAYOUTS[layout])
    algo = fastslim.AutoSlim(architecture=copy.deepcopy(plain), example_inputs=images[:1], divisor=4, seed=1, **options)
    return algo, plain, images, torch.randint(0, 10, (6,))


def subnets_of_next_step(algo: fastslim.AutoSlim) -> list[dict[str, int]]:
    """Output widths by module name of the passes the next step will make."""
    algo = copy.deepcopy(algo)
    choices = [algo.mutator.max_choices, algo.mutator.min_choices]
    choices += [algo.sample_subnet() for _ in range(algo.num_samples)]
    widths = []
    for choice in choices:
        algo.set_subnet(choice)
        widths.append({n: m.active_out for n, m in algo.architecture.named_modules() if hasattr(m, "active_out")})
    assert any(w != widths[0] for w in widths[1:])
    return widths


def relative_error(value: Tensor, truth: Tensor, floor: float = 1e-30) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm().clamp_min(floor))


def assert_equal_to_rounding(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """To 1e-12 of each tensor's largest value; some gradients (a shift before a norm) are zero but for rounding."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        difference = float((ours[key] - value).detach().abs().max())
        assert difference <= 1e-12 * max(1.0, float(value.detach().abs().max())), f"{key}: {difference:.1e}"


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {n: b for n, b in model.named_buffers() if "running" in n}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NETWORKS)
def test_three_steps_equal_the_plain_loop_in_float64(name: str, layout: str) -> None:
    algo, plain, images, labels = make(name, torch.float64, layout)
    forward, net = NETWORKS[name][1], plain_loop.Net(plain)
    optimizers = [torch.optim.SGD(m.parameters(), 1e-3, 0.9, weight_decay=1e-2) for m in (algo, plain)]
    for step in range(3):
        widths = subnets_of_next_step(algo)
        losses = algo.train_step((images, labels), optimizers[0])
        optimizers[1].zero_grad()
        expected = plain_loop.sandwich_passes(net, forward, images, labels, widths)
        torch.testing.assert_close(torch.stack(list(losses.values())), torch.stack(expected), rtol=0, atol=1e-12)
        if step == 0:  # later ones start from weights that differ by rounding, which the network amplifies
            assert_equal_to_rounding(gradients(algo.architecture), gradients(plain))
        optimizers[1].step()
        assert_equal_to_rounding(statistics(algo.architecture), statistics(plain))
    assert_equal_to_rounding(dict(algo.architecture.named_parameters()), dict(plain.named_parameters()))


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_low_precision_errs_at_most_twice_as_much_as_the_plain_loop(name: str, low: torch.dtype) -> None:
    algo, plain, images, labels = make(name, torch.float32, "nhwc")
    forward, truth = NETWORKS[name][1], copy.deepcopy(plain).double()
    widths = subnets_of_next_step(algo)
    with torch.autocast("cpu", low, enabled=low == torch.bfloat16):
        losses = algo.accumulate((images, labels))
        plain_losses = plain_loop.sandwich_passes(plain_loop.Net(plain), forward, images, labels, widths)
    true_losses = plain_loop.sandwich_passes(plain_loop.Net(truth), forward, images.double(), labels, widths)
    eps = torch.finfo(low).eps
    for kind in (gradients, statistics):
        ours, theirs, true = kind(algo.architecture), kind(plain), kind(truth)
        assert ours.keys() == true.keys()
        floor = 1e-3 * max(float(value.norm()) for value in true.values())
        errors = [[relative_error(v[key], true[key], floor) for key in true] for v in (ours, theirs)]
        # An activation that falls on the other side of its kink, in either loop, changes every gradient before it.
        kink = 0.05 if kind is gradients else 0.0
        assert statistics_module.median(errors[0]) <= max(2 * statistics_module.median(errors[1]) + 16 * eps, kink)
        assert max(errors[0]) <= max(2 * kink, 2 * max(errors[1]) + 16 * eps)
    ours, theirs, true = (torch.stack([*map(torch.as_tensor, v)]) for v in (losses.values(), plain_losses, true_losses))
    assert relative_error(ours, true) <= 2 * relative_error(theirs, true) + 16 * eps


def test_mean_reduction_divides_the_summed_gradient() -> None:
    for reduction in ("sum", "mean"):
        algo, plain, images, labels = make("concat", torch.float64, "nchw", grad_reduction=reduction)
        widths = subnets_of_next_step(algo)
        algo.accumulate((images, labels))
        plain_loop.sandwich_passes(
            plain_loop.Net(plain), plain_loop.concat_net, images, labels, widths, mean=reduction == "mean"
        )
        for key, value in gradients(plain).items():
            torch.testing.assert_close(gradients(algo.architecture)[key], value, rtol=1e-12, atol=1e-12)


def test_verify_finds_the_step_exact_and_leaves_the_algorithm_alone() -> None:
    algo, _, images, labels = make("mobilenet_v2", torch.float32, "nhwc")
    before = copy.deepcopy(algo.state_dict())
    report = fastslim.verify(algo, (images, labels))
    assert report, str(report)
    assert {c.kind for c in report.comparisons} == {"losses", "gradients", "statistics"}
    for key, value in algo.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_verify_notices_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastslim.ops.step_buffers import GradientSlot

    algo, _, images, labels = make("grouped", torch.float32, "nchw")
    target = GradientSlot.target
    # A slot that forgets earlier passes: the kind of mistake verify exists for.
    monkeypatch.setattr(GradientSlot, "target", lambda slot, full: (target(slot, full)[0], False))
    report = fastslim.verify(algo, (images, labels))
    assert not report
    assert "NOT EXACT" in str(report)
