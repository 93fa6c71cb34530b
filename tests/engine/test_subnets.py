"""Subnets by name: found ones, uniform ones and files, and what is said about all others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fastslim.engine.config import TrainConfig
from fastslim.engine.export_run import export_run
from fastslim.engine.run import evaluate_run_subnets, load_run, train
from fastslim.engine.search_run import search_run
from fastslim.engine.stage_options import ExportOptions, SearchOptions
from fastslim.engine.subnets import choose_subnet, subnet_key
from fastslim.errors import FastslimFileError, FastslimValueError


def test_a_name_of_the_search_is_what_it_found(trained: Path) -> None:
    search_run(trained, SearchOptions(budget={"flops": [0.5]}, score="loss"), progress=False)
    _, _, algo = load_run(trained)
    found = json.loads((trained / "search" / "results.json").read_text())["subnets"][0]["subnet"]
    chosen = choose_subnet(trained, algo, "flops-0.5")
    assert (chosen.name, chosen.choices, chosen.network) == ("flops-0.5", found, None)
    assert subnet_key(trained, "flops-0.5") == found
    with pytest.raises(
        FastslimValueError, match=r"there is no subnet or file 'flops-0\.6': did you mean 'flops-0\.5'\?$"
    ):
        choose_subnet(trained, algo, "flops-0.6")


def test_uniform_widths_need_no_search(trained: Path) -> None:
    _, _, algo = load_run(trained)
    assert choose_subnet(trained, algo, "width-0.5").choices == algo.uniform_subnet(0.5)
    for text, message in (
        ("width-half", "the width is a ratio such as width-0.5"),
        ("width-2", "width 2 is not a ratio"),
    ):
        with pytest.raises(FastslimValueError, match=message):
            choose_subnet(trained, algo, text)
    with pytest.raises(
        FastslimValueError, match=r"no subnet or file 'best': .*; `fastslim search \S+` has found none yet"
    ):
        choose_subnet(trained, algo, "best")


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_file_of_widths_names_units(trained: Path, tmp_path: Path, suffix: str) -> None:
    _, _, algo = load_run(trained)
    half = algo.uniform_subnet(0.5)
    file = tmp_path / f"mine{suffix}"
    file.write_text(json.dumps(half) if suffix == ".json" else yaml.safe_dump(half))
    chosen = choose_subnet(trained, algo, str(file))
    assert (chosen.name, chosen.choices) == ("mine", half)
    rows = evaluate_run_subnets(trained, [str(file), "width-0.5"])
    assert rows[1].accuracy == rows[2].accuracy and rows[1].multiply_adds == rows[2].multiply_adds
    for text, message in (
        ("[1, 2]", "must hold"),
        ("{", "mine"),
        ('{"unit": 3}', "holds the subnet of another network: no unit is called 'unit'"),
    ):
        file.write_text(text)
        with pytest.raises(FastslimFileError, match=message):
            choose_subnet(trained, algo, str(file))


def test_saved_subnet_counts_with_its_own_weights(trained: Path, tiny: TrainConfig, tmp_path: Path) -> None:
    export_run(trained, ExportOptions(width=(0.5,)))
    other = tmp_path / "other"
    train(tiny.replace(epochs=1, warmup_epochs=0, seed=3), other)
    first = evaluate_run_subnets(trained, ["width-0.5"])[1]
    in_other = evaluate_run_subnets(other, [str(trained / "export" / "width-0.5"), "width-0.5"])
    assert in_other[1].loss == pytest.approx(first.loss, rel=1e-5)
    assert in_other[2].loss != pytest.approx(first.loss, rel=1e-2)


def test_the_subnet_of_another_network_is_refused(trained: Path, tiny: TrainConfig, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train(tiny.replace(model="tiny_run:build_pooled", epochs=1, warmup_epochs=0), other)
    export_run(other, ExportOptions(width=(0.5,)))
    _, _, algo = load_run(trained)
    with pytest.raises(FastslimFileError, match="another network"):
        choose_subnet(trained, algo, str(other / "export" / "width-0.5"))
    with pytest.raises(
        FastslimFileError, match=r"holds no subnet: `fastslim export` writes folders with a subnet\.json"
    ):
        choose_subnet(trained, algo, str(other))
