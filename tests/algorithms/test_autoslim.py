"""AutoSlim in use: both spellings, and everything people put around a step."""

from __future__ import annotations

import copy
import io
import re
import warnings
from typing import NamedTuple

import plain_loop
import pytest
import torch
import torch.nn.functional as F
from autoslim_cases import batch, make, state
from torch import nn

import fastslim
from fastslim import errors, models


def test_ten_lines_train() -> None:
    algo = make()
    optimizer = torch.optim.SGD(algo.parameters(), lr=0.05, momentum=0.9)
    first = algo.train_step(batch(), optimizer)
    assert list(first) == [
        "max_subnet.loss", "min_subnet.loss_kl", "random_subnet_0.loss_kl", "random_subnet_1.loss_kl",
    ]  # fmt: skip
    assert all(value.dim() == 0 and not value.requires_grad for value in first.values())
    for _ in range(20):
        last = algo.train_step(batch(), optimizer)
    assert last["max_subnet.loss"] < 0.5 * first["max_subnet.loss"]
    algo.eval()
    for choose in (algo.set_max_subnet, algo.set_min_subnet, lambda: algo.set_subnet(algo.sample_subnet())):
        choose()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert algo(batch()[0]).shape == (8, 10)


def test_mmrazor_spelling_gives_the_same_step() -> None:
    config = dict(
        mutator=dict(
            type="OneShotChannelMutator",
            channel_unit_cfg=dict(
                type="OneShotMutableChannelUnit",
                default_args=dict(candidate_choices=[i / 12 for i in range(2, 13)], choice_mode="ratio", divisor=4),
            ),
            parse_cfg=dict(type="ChannelAnalyzer", demo_input=(1, 3, 12, 12), tracer_type="BackwardTracer"),
        ),
        distiller=dict(
            type="ConfigurableDistiller",
            teacher_recorders=dict(fc=dict(type="ModuleOutputs", source="fc")),
            student_recorders=dict(fc=dict(type="ModuleOutputs", source="fc")),
            distill_losses=dict(loss_kl=dict(type="KLDivergence", tau=1.0, loss_weight=1.0)),
            loss_forward_mappings=dict(
                loss_kl=dict(
                    preds_S=dict(recorder="fc", from_student=True), preds_T=dict(recorder="fc", from_student=False)
                )
            ),
        ),
    )
    torch.manual_seed(0)
    short = fastslim.AutoSlim(
        architecture=plain_loop.ConcatNet(), example_inputs=torch.randn(1, 3, 12, 12), divisor=4, num_samples=0
    )
    torch.manual_seed(0)
    long = fastslim.AutoSlim(
        **config, architecture=plain_loop.ConcatNet(), data_preprocessor=None, init_cfg=None, num_samples=0
    )
    losses = [algo.accumulate(batch()) for algo in (short, long)]
    assert losses[0].keys() == losses[1].keys()
    torch.testing.assert_close(list(losses[0].values()), list(losses[1].values()))
    for mine, theirs in zip(long.parameters(), short.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_converting_keeps_weights_and_full_width_numbers() -> None:
    torch.manual_seed(0)
    net = plain_loop.ConcatNet().eval()
    x = batch()[0]
    expected, before = net(x), copy.deepcopy(net.state_dict())
    algo = make(net=net).eval()
    assert algo.architecture.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in algo.architecture.state_dict().items())
    with pytest.warns(UserWarning, match="calibrate_batch_norm"):
        y = algo(x)
    torch.testing.assert_close(y, expected)


def test_accumulating_batches_equals_their_sum() -> None:
    algo = make(num_samples=0)
    twice = copy.deepcopy(algo)
    images, labels = batch()
    total = [torch.zeros_like(p) for p in algo.parameters()]
    for index in (0, 1):
        algo.accumulate((images[4 * index :][:4], labels[4 * index :][:4]), scale=0.5)
        part = copy.deepcopy(twice)
        part.accumulate((images[4 * index :][:4], labels[4 * index :][:4]))
        total = [a + 0.5 * p.grad for a, p in zip(total, part.parameters(), strict=True)]
    for p, expected in zip(algo.parameters(), total, strict=True):
        torch.testing.assert_close(p.grad, expected)


def test_clipping_scheduler_and_any_optimizer_work_around_the_step() -> None:
    for build in (torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad):
        algo = make()
        optimizer = build(algo.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        before = state(algo)
        for _ in range(2):
            optimizer.zero_grad()
            algo.accumulate(batch())
            norm = torch.nn.utils.clip_grad_norm_(algo.parameters(), 0.1)
            assert torch.isfinite(norm)
            total = torch.stack([p.grad.norm() for p in algo.parameters()]).norm()
            assert total <= 0.1 + 1e-5
            optimizer.step()
            schedule.step()
        assert not torch.equal(state(algo)["architecture.mix.weight"], before["architecture.mix.weight"])


def test_zero_grad_in_either_form_starts_anew() -> None:
    grads = []
    for set_to_none in (True, False):
        algo = make(num_samples=0)
        optimizer = torch.optim.SGD(algo.parameters(), lr=0.0)
        algo.accumulate(batch())
        optimizer.zero_grad(set_to_none=set_to_none)
        algo.accumulate(batch())
        grads.append([p.grad.clone() for p in algo.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_moving_average_of_the_weights_follows() -> None:
    algo = make()
    optimizer = torch.optim.SGD(algo.parameters(), lr=0.05)
    ema = torch.optim.swa_utils.AveragedModel(algo, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    start = algo.architecture.mix.weight.detach().clone()
    ema.update_parameters(algo)
    algo.train_step(batch(), optimizer)
    ema.update_parameters(algo)
    expected = 0.5 * start + 0.5 * algo.architecture.mix.weight.detach()
    torch.testing.assert_close(ema.module.architecture.mix.weight.detach(), expected)
    ema.module.set_min_subnet()
    assert algo.mutator.current_choices == algo.mutator.max_choices


def test_autocast_trains_in_bf16_with_fp32_weights_and_gradients() -> None:
    algo = make(net=models.mobilenet_v2(10, small_images=True, width_mult=0.5))
    optimizer = torch.optim.SGD(algo.parameters(), lr=0.05)
    dtypes = []
    handle = algo.architecture.features[3].conv[0][0].register_forward_hook(lambda m, i, y: dtypes.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        losses = algo.train_step(batch(), optimizer)
    handle.remove()
    assert set(dtypes) == {torch.bfloat16}
    assert all(torch.isfinite(value) for value in losses.values())
    assert {p.grad.dtype for p in algo.parameters()} == {torch.float32}


def test_copies_and_pickles_train_on() -> None:
    algo = make()
    optimizer = torch.optim.SGD(algo.parameters(), lr=0.05)
    algo.train_step(batch(), optimizer)
    other = copy.deepcopy(algo)
    file = io.BytesIO()
    torch.save(algo, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    results = [m.train_step(batch(), torch.optim.SGD(m.parameters(), lr=0.05)) for m in (algo, other, loaded)]
    for result in results[1:]:
        torch.testing.assert_close(list(result.values()), list(results[0].values()))
    assert torch.equal(algo.architecture.mix.weight, other.architecture.mix.weight)


def test_outside_the_step_it_is_an_ordinary_module() -> None:
    algo = make()
    images, labels = batch()
    algo.set_min_subnet()
    F.cross_entropy(algo(images), labels).backward()
    full = algo.architecture.mix.weight
    assert full.grad.shape == full.shape
    assert not full.grad[algo.architecture.mix.active_out :].any()


def test_one_global_width_and_one_per_unit() -> None:
    uniform, single = make(random_widths="uniform"), make(random_widths="per_unit")
    global_widths = [uniform.uniform_subnet(i / 12) for i in range(2, 13)]
    assert all(uniform.sample_subnet() in global_widths for _ in range(8))
    assert not all(single.sample_subnet() in global_widths for _ in range(8))
    with pytest.raises(errors.FastslimValueError, match="'per_unit' or 'uniform', got 'unifrom'"):
        make(random_widths="unifrom")


def test_zero_x_call_returns_what_its_runner_expects() -> None:
    algo = make()
    images, labels = batch()
    out = algo.train_step(dict(img=images, gt_label=labels), torch.optim.SGD(algo.parameters(), lr=0.1))
    assert out["num_samples"] == 8
    assert out["log_vars"]["max_subnet.loss"] > 0
    total = out["log_vars"].pop("loss")
    assert float(out["loss"]) == total == pytest.approx(sum(out["log_vars"].values()), rel=1e-5)


def test_own_loss_and_fused_cross_entropy_agree() -> None:
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.linspace(0.5, 1.5, 10))
    fused = make(loss=criterion, num_samples=0).accumulate(batch())
    own = make(loss=lambda out, y: {"loss_ce": criterion(out, y)}, num_samples=0).accumulate(batch())
    torch.testing.assert_close(fused["max_subnet.loss"], own["max_subnet.loss_ce"])


def test_hard_and_soft_labels_for_students() -> None:
    losses = make(student_loss="ce+kd").accumulate(batch())
    assert {"min_subnet.loss", "min_subnet.loss_kl"} <= losses.keys()


# What ordinary use brings along


def test_network_that_returns_a_named_tuple_is_distilled() -> None:
    class Outputs(NamedTuple):
        logits: torch.Tensor
        features: torch.Tensor

    class Net(plain_loop.ConcatNet):
        def forward(self, x):
            return Outputs(super().forward(x), x)

    fc = dict(fc=dict(type="ModuleOutputs", source="fc"))
    distiller = dict(
        type="ConfigurableDistiller",
        teacher_recorders=fc,
        student_recorders=fc,
        distill_losses=dict(loss_kl=dict(type="KLDivergence")),
    )
    algo = make(net=Net(), distiller=distiller, loss=lambda out, y: F.cross_entropy(out.logits, y))
    losses = algo.accumulate(batch())
    assert list(losses)[:2] == ["max_subnet.loss", "min_subnet.loss_kl"]


def test_frozen_parameter_stays_where_it_is() -> None:
    algo = make()
    optimizer = torch.optim.SGD(algo.parameters(), lr=0.1, momentum=0.0)
    algo.train_step(batch(), optimizer)
    frozen = algo.architecture.mix.weight.requires_grad_(False)
    before = frozen.detach().clone()
    algo.train_step(batch(), optimizer)
    assert torch.equal(frozen, before)


def test_hooks_on_parameters_see_and_change_gradients() -> None:
    plain, masked = make(), make()
    seen = []
    masked.architecture.mix.weight.register_hook(lambda grad: grad * 0)
    masked.architecture.fc.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    for algo in (plain, masked):
        algo.accumulate(batch())
    assert not masked.architecture.mix.weight.grad.any()
    assert plain.architecture.mix.weight.grad.any()
    assert seen == [masked.architecture.fc.weight.shape] * 4
    torch.testing.assert_close(masked.architecture.fc.weight.grad, plain.architecture.fc.weight.grad)


class Shaped(plain_loop.ConcatNet):
    """A concat net whose forward looks at attributes, makes tensors and draws random numbers."""

    p, draws, own_tensor = 0.0, False, False

    def forward(self, x):
        if self.own_tensor:
            x = x - torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)
        if self.draws and torch.rand(1).item() < 0.5:
            x = -x
        return super().forward(x) if self.p == 0 else super().forward(x * (1 - self.p))


def test_forward_that_cannot_be_recorded_runs_itself() -> None:
    net = Shaped()
    net.draws = True
    algo = make(net=net)
    assert algo._plan is None
    assert re.search(r"decides by .* random numbers at .*test_autoslim", algo.plan_report[0])
    algo.accumulate(batch())


def test_plan_of_a_forward_that_makes_tensors_of_its_own() -> None:
    net = Shaped()
    net.own_tensor = True
    algo, unfused = make(net=copy.deepcopy(net)), make(net=net, fuse=False)
    assert algo._plan is not None and unfused._plan is None
    for _ in range(2):
        losses = [each.accumulate(batch()) for each in (algo, unfused)]
        torch.testing.assert_close(losses[0], losses[1])
    for ours, theirs in zip(algo.parameters(), unfused.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_plan_steps_aside_when_the_network_has_changed() -> None:
    net = Shaped()
    algo, unfused = make(net=copy.deepcopy(net)), make(net=net, fuse=False)
    assert algo._plan is not None
    for change in (lambda net: setattr(net, "p", 0.5), lambda net: setattr(net, "fc", fastslim.nn.SlimLinear(32, 10))):
        for each in (algo, unfused):
            torch.manual_seed(3)
            change(each.architecture)
        losses = [each.accumulate(batch()) for each in (algo, unfused)]
        torch.testing.assert_close(losses[0], losses[1])
    assert algo.architecture.fc.weight.grad is not None
