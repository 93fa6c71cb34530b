"""Evaluation: which widths, that calibration is what makes narrow ones work, and how numbers are shown."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from fastslim.data import make_loader
from fastslim.engine.build import build_data, build_supernet
from fastslim.engine.config import TrainConfig
from fastslim.engine.evaluate import WidthResult, evaluate_widths, format_count, format_table, spaced_widths
from fastslim.engine.run import evaluate_run, load_run, train
from fastslim.errors import FastslimValueError


@pytest.mark.parametrize(
    ("choices", "count", "expected"),
    [
        ((0.25, 0.5, 0.75, 1.0), 4, [0.25, 0.5, 0.75, 1.0]),
        ((0.25, 0.5, 0.75, 1.0), 2, [0.25, 1.0]),
        ((1.0, 0.25), 5, [0.25, 1.0]),
        (tuple(i / 12 for i in range(2, 13)), 6, [2 / 12, 4 / 12, 6 / 12, 8 / 12, 10 / 12, 1.0]),
        ((0.1, 0.15, 0.9, 1.0), 3, [0.1, 0.9, 1.0]),
        ((1.0,), 4, [1.0]),
    ],
)
def test_widths_are_evenly_spaced_choices(choices: tuple[float, ...], count: int, expected: list[float]) -> None:
    assert spaced_widths(choices, count) == expected


def test_calibration_is_what_makes_narrow_widths_work(tmp_path: Path, tiny: TrainConfig) -> None:
    config = tiny.replace(data="digits", model="tiny_run:build_pooled", epochs=4, batch_size=64, lr=0.1, eval_every=4)
    calibrated = train(config, tmp_path / "run").widths
    with pytest.warns(UserWarning, match="Calibrate first"):
        uncalibrated = evaluate_run(tmp_path / "run", calibrate=False)
    assert calibrated[0].accuracy > 0.8
    errors = {"with": 1 - calibrated[0].accuracy, "without": 1 - uncalibrated[0].accuracy}
    assert errors["without"] > 2.5 * errors["with"]
    assert errors["without"] > errors["with"] + 0.1


def test_accuracy_and_loss_are_those_of_the_network(tmp_path: Path, tiny: TrainConfig) -> None:
    result = train(tiny, tmp_path / "run").widths[-1]
    config, data, algo = load_run(tmp_path / "run")
    calibration = [torch.utils.data.default_collate([data.calibration[i] for i in range(48)])]
    rows = evaluate_widths(algo, make_loader(data.val, 7, shuffle=False), [1.0], calibration=calibration)
    images, labels = torch.utils.data.default_collate([data.val[i] for i in range(24)])
    logits = algo.eval()(images).detach()
    assert rows[0].accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert rows[0].loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert rows[0].multiply_adds == result.multiply_adds


def test_evaluation_changes_nothing_that_training_depends_on(tiny: TrainConfig) -> None:
    data = build_data(tiny)
    algo = build_supernet(tiny, data, torch.device("cpu")).train()
    loader = make_loader(data.val, 8, shuffle=False)
    before = {key: value.clone() for key, value in algo.architecture.state_dict().items()}
    random_state = torch.get_rng_state()
    evaluate_widths(algo, loader, [0.25, 1.0], calibration=make_loader(data.train, 16, shuffle=True))
    assert algo.training
    assert algo.mutator.current_choices == algo.mutator.max_choices
    assert all(torch.equal(value, before[key]) for key, value in algo.architecture.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_empty_loaders_are_refused(tiny: TrainConfig) -> None:
    data = build_data(tiny)
    algo = build_supernet(tiny, data, torch.device("cpu"))
    loader = make_loader(data.val, 8, shuffle=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(FastslimValueError, match="the held-out data is empty"):
            evaluate_widths(algo, [], [1.0], calibration=None)
        with pytest.raises(FastslimValueError, match="the calibration loader yields no batch"):
            evaluate_widths(algo, loader, [1.0], calibration=[])


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (44_500, "44.5 k"), (701_178, "701 k"), (1_234_567, "1.23 M"),
     (1_814_000_000, "1.81 G"), (1_234_000_000_000, "1234 G")],
)  # fmt: skip
def test_counts_have_three_digits(number: int, shown: str) -> None:
    assert format_count(number) == shown


def test_table_is_aligned_and_widest_first() -> None:
    rows = [WidthResult(0.25, 138_000, 44_500, 0.957, 0.1), WidthResult(1.0, 2_170_000, 701_000, 1.0, 0.1)]
    assert format_table(rows) == (
        "width   multiply-adds   of full   parameters   accuracy\n"
        "-----   -------------   -------   ----------   --------\n"
        "1.00x          2.17 M   100.0 %        701 k   100.00 %\n"
        "0.25x           138 k     6.4 %       44.5 k    95.70 %"
    )
