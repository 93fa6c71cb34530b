"""Learning-rate schedules and optimizers against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastslim.engine.build import build_data, build_supernet
from fastslim.engine.config import TrainConfig
from fastslim.engine.ema import WeightAverage
from fastslim.engine.schedule import lr_factor, make_optimizer, make_scheduler


def factors(steps_per_epoch: int, **options: object) -> list[float]:
    config = TrainConfig(**options)
    return [lr_factor(step, config, steps_per_epoch) for step in range(config.epochs * steps_per_epoch)]


def test_warm_up_rises_in_a_line_and_cosine_ends_near_zero() -> None:
    seen = factors(10, epochs=5, warmup_epochs=1)
    assert seen[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert seen[10:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * i / 40) for i in range(40)])
    assert 0 < seen[-1] < 0.002


def test_steps_drop_at_their_parts_of_the_run() -> None:
    seen = factors(10, epochs=4, warmup_epochs=0, lr_schedule="step", lr_milestones=(0.5, 0.75), lr_gamma=0.1)
    assert seen == pytest.approx([1.0] * 20 + [0.1] * 10 + [0.01] * 10)


def test_a_line_ends_one_step_above_zero() -> None:
    seen = factors(10, epochs=3, warmup_epochs=1, lr_schedule="linear")
    assert seen == pytest.approx([(i + 1) / 10 for i in range(10)] + [1 - i / 20 for i in range(20)])


def test_constant_stays() -> None:
    assert factors(3, epochs=2, warmup_epochs=0, lr_schedule="constant") == [1.0] * 6


def test_scheduler_follows_the_factors() -> None:
    config = TrainConfig(epochs=3, warmup_epochs=1, lr=0.2)
    optimizer = make_optimizer(nn.Linear(2, 2), config)
    scheduler = make_scheduler(optimizer, config, steps_per_epoch=4)
    seen = []
    for _ in range(12):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([0.2 * lr_factor(step, config, 4) for step in range(12)])


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_weight_decay_spares_bn_and_biases(name: str, kind: type) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    optimizer = make_optimizer(model, TrainConfig(optimizer=name, weight_decay=0.3, norm_weight_decay=0.01))
    assert isinstance(optimizer, kind)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {key: decay[id(p)] for key, p in model.named_parameters()} == {
        "0.weight": 0.3, "0.bias": 0.01, "1.weight": 0.01, "1.bias": 0.01, "2.weight": 0.3, "2.bias": 0.01,
    }  # fmt: skip


def test_average_follows_its_formula_and_swaps_back() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    weight = model.weight
    values = [1.0, 2.0, 5.0, -3.0]
    with torch.no_grad():
        weight.fill_(values[0])
    average = WeightAverage(model, decay=0.25)
    expected = values[0]
    for count, value in enumerate(values[1:], start=1):
        with torch.no_grad():
            weight.fill_(value)
        average.update()
        decay = min(0.25, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * value
    with average.swapped_in():
        assert model.weight is weight
        assert weight.item() == pytest.approx(expected, rel=1e-12)
    assert weight.item() == values[-1]
    other = WeightAverage(nn.Linear(1, 1, bias=False).double(), decay=0.25)
    other.load_state_dict(average.state_dict())
    assert other.averages["weight"].item() == pytest.approx(expected, rel=1e-12)
    assert other.updates == 3


def test_label_smoothing_reaches_the_supernets_loss() -> None:
    config = TrainConfig(label_smoothing=0.1, width_mult=0.25)
    algo = build_supernet(config, build_data(config), torch.device("cpu"))
    logits, labels = torch.randn(4, 10), torch.tensor([1, 2, 3, 4])
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(algo.task_loss(logits, labels), expected)
    with pytest.raises(ValueError, match="label_smoothing=1.0: must be below 1"):
        TrainConfig(label_smoothing=1)
