"""An OptimWrapper is obeyed to the letter: every pass is one update, in float64 the same as the loop by hand."""

from __future__ import annotations

import copy
import statistics
from functools import partial
from typing import Any
from unittest.mock import Mock

import plain_loop
import pytest
import torch
import torch.nn.functional as F
from mmengine.optim import build_optim_wrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine_toys import DISTILLER, ModeToy, PlainToy, batch, by_hand, make, widths_of_next_step
from torch import Tensor, nn

STEPS = 5
SGD = dict(type="SGD", lr=0.05, momentum=0.9, weight_decay=1e-2)
GROUPS = dict(
    norm_decay_mult=0.0, bias_lr_mult=2.0, bias_decay_mult=0.0, custom_keys={"fc": dict(lr_mult=0.5, decay_mult=3.0)}
)


def hub(iterations: int) -> Mock:
    """What the wrapper of a Runner knows about the run."""
    message_hub = Mock()
    message_hub.runtime_info = {"iter": 0, "max_iters": iterations}
    return message_hub


def step_by_hand(
    net: plain_loop.Net, model: nn.Module, data: dict[str, Tensor], widths: list[dict[str, int]], wrapper: Any
) -> None:
    """The passes one after the other, each handed to the wrapper."""
    teacher = None
    for net.widths in widths:
        with wrapper.optim_context(model):
            output = by_hand(net, data["inputs"])
            if teacher is None:
                loss, teacher = F.cross_entropy(output, data["data_samples"]), output.detach().softmax(1)
            else:
                loss = F.kl_div(output.log_softmax(1), teacher, reduction="batchmean")
        wrapper.update_params(loss)


def train(config: dict[str, Any], data: list[dict[str, Tensor]], **options: Any) -> tuple[dict[str, Tensor], ...]:
    """Weights and statistics after some steps of the algorithm, and of the loop by hand."""
    algo, plain = make(**options)
    prefixed = nn.Module()
    prefixed.architecture = plain
    ours, theirs = build_optim_wrapper(algo, config), build_optim_wrapper(prefixed, config)
    assert len(ours.param_groups) == len(theirs.param_groups)
    ours.message_hub = hub(len(data))
    theirs.initialize_count_status(prefixed, 0, 4 * len(data))
    net = plain_loop.Net(plain)
    for one in data:
        widths = widths_of_next_step(algo)
        algo.train_step(one, ours)
        step_by_hand(net, prefixed, one, widths, theirs)
    assert ours._inner_count == theirs._inner_count == 4 * len(data)
    assert ours._max_counts == 4 * len(data)
    return tuple(
        {key: value for key, value in module.state_dict().items() if value.is_floating_point()}  # F counts no batches
        for module in (algo.architecture, plain)
    )


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(
            ours[key], value, rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.filterwarnings("ignore:accumulative_counts")
@pytest.mark.parametrize("counts", [1, 2, 3, 4, 8])
def test_every_count_of_accumulated_passes_equals_the_loop_by_hand(counts: int) -> None:
    """With 8, the 20 passes of the run end in 4 that the wrapper weighs and steps for themselves."""
    config = dict(type="OptimWrapper", optimizer=SGD, accumulative_counts=counts)
    assert_equal(*train(config, [batch(seed=seed) for seed in range(STEPS)]))


@pytest.mark.filterwarnings("ignore:accumulative_counts")
@pytest.mark.parametrize("counts", [1, 4])
@pytest.mark.parametrize("architecture", [PlainToy, ModeToy])
def test_so_it_does_with_a_distiller(counts: int, architecture: type[nn.Module]) -> None:
    config = dict(type="OptimWrapper", optimizer=SGD, accumulative_counts=counts)
    data = [batch(seed=seed) for seed in range(STEPS)]
    assert_equal(*train(config, data, architecture=architecture, distiller=DISTILLER))


@pytest.mark.filterwarnings("ignore:accumulative_counts")
@pytest.mark.parametrize("counts", [1, 4, 8])
def test_clipped_gradients_and_groups_of_parameters_equal_the_loop_by_hand(counts: int) -> None:
    config = dict(
        type="OptimWrapper",
        optimizer=SGD,
        accumulative_counts=counts,
        clip_grad=dict(max_norm=0.05),
        paramwise_cfg=GROUPS,
    )
    data = [batch(seed=seed) for seed in range(STEPS)]
    ours, theirs = train(config, data)
    assert_equal(ours, theirs)
    unclipped, _ = train({**config, "clip_grad": None}, data)
    assert not torch.allclose(ours["fc.weight"], unclipped["fc.weight"], rtol=1e-3)


@pytest.fixture
def amp_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """AmpOptimWrapper asks for a GPU when it is made; what it does runs on a CPU as well."""
    monkeypatch.setattr(amp_optimizer_wrapper, "is_cuda_available", lambda: True)
    monkeypatch.setattr(amp_optimizer_wrapper, "GradScaler", partial(torch.amp.GradScaler, "cpu"))


AMP = dict(
    type="AmpOptimWrapper", optimizer=SGD, dtype="bfloat16", loss_scale=dict(init_scale=256.0, growth_interval=2)
)


@pytest.mark.usefixtures("amp_on_cpu")
@pytest.mark.filterwarnings("ignore:accumulative_counts")
@pytest.mark.parametrize("counts", [1, 4, 8])
def test_scaled_losses_equal_the_loop_by_hand(counts: int) -> None:
    """In float64, which autocast leaves alone; the scale grows every second step and gradients are clipped unscaled."""
    config = {**AMP, "accumulative_counts": counts, "clip_grad": dict(max_norm=0.05)}
    assert_equal(*train(config, [batch(seed=seed) for seed in range(STEPS)]))


@pytest.mark.usefixtures("amp_on_cpu")
def test_bfloat16_errs_at_most_twice_as_much_as_the_loop_by_hand() -> None:
    config = {**AMP, "accumulative_counts": 4}
    data = [batch(torch.float32, seed=seed) for seed in range(STEPS)]
    exact = [{**one, "inputs": one["inputs"].double()} for one in data]
    ours, theirs = train(config, data, dtype=torch.float32)
    _, truth = train(dict(type="OptimWrapper", optimizer=SGD, accumulative_counts=4), exact)
    errors = [
        [float((state[key].double() - value).norm() / value.norm().clamp_min(1e-3)) for key, value in truth.items()]
        for state in (ours, theirs)
    ]
    assert statistics.median(errors[0]) <= 2 * statistics.median(errors[1]) + 16 * torch.finfo(torch.float32).eps
    assert max(errors[0]) <= 2 * max(errors[1]) + 16 * torch.finfo(torch.float32).eps
    assert max(errors[1]) > 1e-4  # it has been bfloat16


@pytest.mark.parametrize("architecture", [PlainToy, ModeToy])
def test_the_wrapper_counts_every_pass(architecture: type[nn.Module]) -> None:
    algo, _ = make(architecture, student_loss="ce+kd", distiller=DISTILLER)
    wrapper = build_optim_wrapper(algo, dict(optimizer=SGD, accumulative_counts=4))
    wrapper.message_hub = hub(100)
    assert not algo._optim_wrapper_count_status_reinitialized
    losses = algo.train_step(batch(), wrapper)
    assert len(losses) == 7
    assert {"max_subnet.loss", "min_subnet.loss", "min_subnet.loss_kl", "random_subnet_1.loss_kl"} <= losses.keys()
    assert algo._optim_wrapper_count_status_reinitialized
    assert wrapper._inner_count == 4
    assert wrapper._max_counts == 400
    algo.train_step(batch(), optim_wrapper=wrapper)
    assert wrapper._inner_count == 8


def test_fewer_counts_than_passes_are_pointed_out() -> None:
    algo, _ = make()
    wrapper = build_optim_wrapper(algo, dict(optimizer=SGD))
    with pytest.warns(UserWarning, match="accumulative_counts=1: the optim wrapper makes 4 optimizer steps"):
        algo.train_step(batch(), wrapper)


def test_a_nonfinite_loss_names_its_pass_and_leaves_gradients_untouched() -> None:
    algo, _ = make(loss=lambda output, targets: output.sum() * float("inf"))
    wrapper = build_optim_wrapper(algo, dict(optimizer=SGD, accumulative_counts=4))
    before = copy.deepcopy(algo.architecture.state_dict())
    with pytest.raises(RuntimeError, match="max_subnet pass"):
        algo.train_step(batch(), wrapper)
    assert_equal(algo.architecture.state_dict(), before, 0.0)
    assert all(p.grad is None for p in algo.parameters())
