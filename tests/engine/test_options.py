"""Options of every command: YAML and flags give the same, and wrong keys and values are explained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fastslim.engine.config import TrainConfig
from fastslim.engine.options import Options, differences
from fastslim.engine.stage_options import EvalOptions, ExportOptions, RetrainConfig, SearchOptions, retrain_config
from fastslim.errors import FastslimError, FastslimTypeError, FastslimValueError


@pytest.mark.parametrize("kind", [TrainConfig, SearchOptions, ExportOptions, EvalOptions, RetrainConfig])
def test_every_option_explains_itself(kind: type[Options]) -> None:
    for entry in dataclasses.fields(kind):
        assert len(entry.metadata["help"]) > 8, entry.name


BUDGETS = {"flops": (0.5, 0.25), "parameters": (300000.0,)}


@pytest.mark.parametrize(
    "budget",
    [
        ["flops=0.5,0.25", "parameters=300000"],
        ["flops=0.5", "parameters=3e5", "flops=0.25"],
        {"flops": [0.5, 0.25], "parameters": 300000},
        {"flops": "0.5,0.25", "parameters": "3e5"},
    ],
    ids=["flags", "repeated", "mapping", "texts"],
)
def test_budgets_are_flags_or_a_mapping(budget: object) -> None:
    assert SearchOptions.from_mapping({"budget": budget}, "the flags").budget == BUDGETS


def test_saved_options_read_back_equal(tmp_path: Path) -> None:
    for options in (
        SearchOptions(budget=BUDGETS, images=7, calibrate=False),
        ExportOptions(subnet=("flops-0.5",), width=(0.5,), format=("onnx", "pt2")),
        RetrainConfig(subnet="flops-0.5", start="scratch", lr=1e-3),
    ):
        options.save(tmp_path / "options.yaml")
        assert type(options).from_file(tmp_path / "options.yaml") == options


@pytest.mark.parametrize(
    ("kind", "text", "error", "message"),
    [
        (
            SearchOptions,
            "budgets: {flops: 0.5}",
            FastslimValueError,
            "unknown key 'budgets' in {path}: did you mean 'bu",
        ),
        (SearchOptions, "method: greedy", FastslimValueError, "there is no budget: give for example --budget flops="),
        (
            SearchOptions,
            "budget: 0.5",
            FastslimTypeError,
            "budget takes names with numbers, such as flops=0.5,0.25, not",
        ),
        (SearchOptions, "budget: {flops: half}", FastslimTypeError, "budget flops must be a number, not 'half' (str)"),
        (SearchOptions, "budget: {flops: 1}\nbatches: 0", FastslimValueError, "batches=0: must be at least 1"),
        (
            SearchOptions,
            "budget: {flops: 1}\nmethod: evolve",
            FastslimValueError,
            "method: 'evolve' is not possible: known: ev",
        ),
        (ExportOptions, "format: [onnx, pt]", FastslimValueError, "format: 'pt' is not possible: did you mean 'pt2'?"),
        (
            ExportOptions,
            "formats: [onnx]",
            FastslimValueError,
            "unknown key 'formats' in {path}: did you mean 'format'",
        ),
        (ExportOptions, "width: [0.5, 2]", FastslimValueError, "width 2 is not a ratio above 0 and up to 1"),
        (EvalOptions, "subnet: [a]\nwidths: [1]", FastslimValueError, "give either widths or subnets to evaluate"),
        (RetrainConfig, "distil: true", FastslimValueError, "unknown key 'distil' in {path}: did you mean 'distill'?"),
    ],
)
def test_wrong_file_is_explained(
    tmp_path: Path, kind: type[Options], text: str, error: type[FastslimError], message: str
) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(text)
    with pytest.raises(error) as caught:
        kind.from_file(path)
    assert str(caught.value).startswith(message.format(path=path))


def test_what_is_shown_differently_is_no_difference() -> None:
    first = SearchOptions(budget=BUDGETS)
    assert differences(first, first.replace(device="cpu")) == []
    assert differences(first, first.replace(images=5)) == ["images: None there, 5 here"]


def test_a_subnet_keeps_what_its_supernet_was_made_of() -> None:
    run = TrainConfig(epochs=7, lr=0.3, width_mult=0.5)
    config = retrain_config(run, {"subnet": "flops-0.5", "epochs": 2}, "the flags")
    assert (config.epochs, config.lr, config.width_mult, config.start, config.distill) == (
        2,
        0.3,
        0.5,
        "supernet",
        False,
    )
    with pytest.raises(
        FastslimValueError, match=r"divisor=4 in the flags: the supernet was trained with 8, and a subnet"
    ):
        retrain_config(run, {"divisor": 4}, "the flags")
