"""A run's search: what it scores on, its table against other computations, and entering its folder again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from fastslim.algorithms import AutoSlim
from fastslim.cost import LatencyReport, LatencyRow
from fastslim.engine import search_run as module
from fastslim.engine.config import TrainConfig
from fastslim.engine.report_parts import read_parts
from fastslim.engine.run import evaluate_run, evaluate_run_subnets, load_run, train
from fastslim.engine.search_outcome import SearchOutcome, format_outcome, nearest_uniform
from fastslim.engine.search_run import search_run
from fastslim.engine.stage_options import SearchOptions
from fastslim.errors import FastslimFileError, FastslimRuntimeError, FastslimValueError
from fastslim.search import SearchReport
from fastslim.search.search_folder import SearchFolder

HALF = SearchOptions(budget={"flops": [0.5, 0.25]}, score="loss")


def search(run: Path, options: SearchOptions = HALF, **how: bool) -> SearchOutcome:
    return search_run(run, options, progress=False, **how)


def test_what_is_found_keeps_its_budget_and_is_measured_on_held_out_images(trained: Path) -> None:
    outcome = search(trained)
    assert outcome.status == "searched" and outcome.scored_on == "12 images left out of the training"
    assert [row.result.name for row in outcome.rows] == ["flops-0.5", "flops-0.25"]
    for row in outcome.rows:
        assert row.result.multiply_adds <= row.budget * outcome.full.multiply_adds
    again = evaluate_run_subnets(trained, ["flops-0.5", "flops-0.25"])
    assert again == [outcome.full, *(row.result for row in outcome.rows)]
    uniform = {row.width: row for row in evaluate_run(trained)}
    for row in outcome.rows:
        same = uniform[float(row.uniform.name.removeprefix("width-"))]
        assert (row.uniform.accuracy, row.uniform.multiply_adds) == (same.accuracy, same.multiply_adds)


def test_scores_come_from_the_images_that_were_left_out(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    original = module.greedy

    def greedy(algo, images, *rest, **options):
        seen.extend(batch for batch, _ in images)
        return original(algo, images, *rest, **options)

    monkeypatch.setattr(module, "greedy", greedy)
    search(trained)
    import tiny_run

    train_set, held_out = tiny_run.load()
    scored = {image.numpy().tobytes() for image in torch.cat(seen)}
    assert len(scored) == 12
    assert scored <= {train_set[i][0].numpy().tobytes() for i in range(48)}
    assert not scored & {held_out[i][0].numpy().tobytes() for i in range(24)}


def test_fewer_images_are_a_mixture_of_them(trained: Path) -> None:
    assert search(trained, HALF.replace(images=6, batch_size=2, batches=2)).scored_on == (
        "6 images left out of the training, at most 2 batches of 2"
    )
    with pytest.raises(FastslimValueError, match="images=13: there are 12 to search on; ask for at most that"):
        search(trained, HALF.replace(images=13), overwrite=True)


def test_a_run_that_left_nothing_out_is_searched_on_its_training_images(tiny: TrainConfig, tmp_path: Path) -> None:
    train(tiny.replace(epochs=1, warmup_epochs=0), tmp_path / "run")
    assert search(tmp_path / "run").scored_on == "48 images of the training, seen by the supernet"


def test_finished_search_is_not_done_again(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = search(trained)
    before = {path: path.read_bytes() for path in (trained / "search").iterdir()}
    assert {path.name for path in before} == {"evaluated.jsonl", "report.json", "results.json", "state.json"}
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_run", lambda *_, **__: pytest.fail("a finished search was begun again"))
        again = search(trained, HALF.replace(device="cpu"))
        assert search(trained, resume=True).status == "finished before"
    assert (again.status, again.rows, again.full) == ("finished before", first.rows, first.full)
    assert {path: path.read_bytes() for path in (trained / "search").iterdir()} == before
    assert format_outcome(again) == format_outcome(first)
    assert search(trained, overwrite=True).rows == first.rows


def test_other_options_are_not_mixed_into_a_search(trained: Path, tiny: TrainConfig) -> None:
    search(trained)
    with pytest.raises(
        FastslimValueError, match=r"holds a search with other options \(score: 'loss' there, 'accuracy' h"
    ):
        search(trained, HALF.replace(score="accuracy"))
    train(tiny.replace(epochs=1, warmup_epochs=0, search_share=0.25, seed=5), trained, overwrite=True)
    with pytest.raises(FastslimValueError, match=r"the supernet or the subnets have changed since.*--overwrite"):
        search(trained)
    assert search(trained, overwrite=True).status == "searched"


@pytest.mark.parametrize(
    "options",
    [
        HALF,
        SearchOptions(
            budget={"parameters": [0.5]}, method="evolution", population_size=6, generations=3, top_k=2, calibrate=False
        ),
    ],
    ids=["greedy", "evolution"],
)
def test_interrupted_search_goes_on_to_the_same_result(
    trained: Path, monkeypatch: pytest.MonkeyPatch, options: SearchOptions
) -> None:
    whole = search(trained, options)
    report = (trained / "search" / "report.json").read_text()
    count = 0
    append = SearchFolder.append

    def interrupted(self, record):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        append(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(SearchFolder, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            search(trained, options, overwrite=True)
    assert json.loads((trained / "search" / "results.json").read_text())["finished"] is False
    with pytest.raises(FastslimValueError, match="holds an unfinished search: continue it with --resume, or"):
        search(trained, options)
    assert search(trained, options, resume=True).rows == whole.rows
    assert (trained / "search" / "report.json").read_text() == report


def test_budget_below_the_smallest_subnet_names_it_and_keeps_the_search_that_is_there(trained: Path) -> None:
    first = search(trained)
    message = r"the budget 0\.01 of flops is below the smallest subnet, which has 8856 \(0\.0688 of the full network\)"
    with pytest.raises(FastslimValueError, match=message):
        search(trained, SearchOptions(budget={"flops": [0.5, 0.01]}), overwrite=True)
    with pytest.raises(FastslimValueError, match=r"no cost is called 'flop'; did you mean 'flops'"):
        search(trained, SearchOptions(budget={"flop": [0.5]}), overwrite=True)
    assert search(trained).rows == first.rows


def test_there_must_be_a_trained_run(tmp_path: Path) -> None:
    with pytest.raises(FastslimFileError, match=r"there is no run folder \S*nowhere: `fastslim train --run"):
        search(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FastslimFileError, match=r"there is no checkpoint \S*last\.pt: train the supernet first"):
        search(tmp_path / "empty")


def test_foreign_and_damaged_files_are_left_alone(trained: Path) -> None:
    (trained / "search").mkdir()
    (trained / "search" / "notes.txt").write_text("precious")
    with pytest.raises(FastslimFileError, match=r"search exists already and holds no search to go on with: replace it"):
        search(trained)
    (trained / "search" / "results.json").write_text("{")
    with pytest.raises(FastslimFileError, match=r"results\.json is damaged .*: replace it with --overwrite"):
        search(trained)
    search(trained, overwrite=True)
    assert (trained / "search" / "notes.txt").read_text() == "precious"


def test_a_score_that_is_not_finite_stops_the_search(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "minus_loss", lambda output, targets: output.sum(1) * float("nan"))
    with pytest.raises(FastslimRuntimeError):
        search(trained)


def test_uniform_width_beside_a_subnet_costs_about_the_same(trained: Path) -> None:
    _, _, algo = load_run(trained)
    costs = {ratio: algo.subnet_cost(algo.uniform_subnet(ratio)).parameters for ratio in (0.25, 0.5, 1.0)}
    for ratio, cost in costs.items():
        assert nearest_uniform(algo, (1.0, 0.25, 0.5), "parameters", cost + 50) == ratio


def test_the_report_of_the_search_reads_back(trained: Path) -> None:
    outcome = search(trained)
    report = SearchReport.load(outcome.folder / "report.json")
    saved = json.loads((outcome.folder / "results.json").read_text())
    assert [row["subnet"] for row in saved["subnets"]] == [report.best("flops", 0.5), report.best("flops", 0.25)]
    assert [row["score"] for row in saved["subnets"]] == [found.score for found in report.found]


class PredictedTimes:
    """In place of measured times: a microsecond for every thousand multiply-adds, on top of one millisecond."""

    made = 0

    def __init__(self, algo: AutoSlim, **how: object) -> None:
        self.algo, self.level = algo, 0
        assert how == {"device": "cpu", "batch_size": 4, "cache": how["cache"]}

    def measure(self, seconds: float, progress: bool) -> None:
        type(self).made += 1
        self.level = 1

    def predict(self, subnet: dict[str, int]) -> float:
        return 1 + self.algo.subnet_cost(subnet).multiply_adds / 1e6

    def check(self) -> LatencyReport:
        subnet = self.algo.mutator.max_choices
        rows = (LatencyRow(subnet, 100, self.predict(subnet), 2.0),)
        return LatencyReport(rows, "a clock that multiplies")


def test_latency_is_a_budget_like_others(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LatencyTable", PredictedTimes)
    options = SearchOptions(budget={"latency": [1.05], "flops": [0.5]}, score="loss", latency_batch_size=4)
    outcome = search(trained, options)
    rows = {row.result.name: row for row in outcome.rows}
    row = rows["latency-1.05"]
    assert row.costs["latency"] == 1 + row.result.multiply_adds / 1e6 <= 1.05
    assert row.uniform_costs["latency"] == 1 + row.uniform.multiply_adds / 1e6
    assert re.search(r"latency-1\.05 .* 1\.0\d ms, 9\d\.\d % .* ms, ", format_outcome(outcome))
    assert read_parts(trained).latency.where == "a clock that multiplies"  # what the report shows
    assert PredictedTimes.made == 1
    assert (search(trained, options).rows, PredictedTimes.made) == (outcome.rows, 1)
    with pytest.raises(
        FastslimValueError, match=r"the budget 1\.001 of latency is below the smallest subnet, which has 1"
    ):
        search(trained, options.replace(budget={"latency": [1.001]}), overwrite=True)


def test_a_latency_device_that_is_not_here_is_named(trained: Path) -> None:
    before = sorted(trained.iterdir())
    with pytest.raises(
        FastslimValueError, match="latency cannot be measured on 'cuda:3': there are 0 CUDA devices here"
    ):
        search(trained, SearchOptions(budget={"latency": [0.5]}, latency_device="cuda:3"))
    assert sorted(trained.iterdir()) == before


def test_too_short_a_time_for_measuring_is_explained(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PredictedTimes, "measure", lambda *_, **__: None)
    monkeypatch.setattr(module, "LatencyTable", PredictedTimes)
    with pytest.raises(FastslimRuntimeError, match=r"60 s were too short .* or with a larger --latency-seconds"):
        search(trained, SearchOptions(budget={"latency": [0.5]}, latency_batch_size=4))
