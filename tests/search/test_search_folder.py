"""Whatever interrupts a search, the folder holds what was done, and the search goes on to the same result."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import search_cases as cases
import torch

from fastslim.errors import FastslimFileError, FastslimValueError
from fastslim.search import SearchReport, evolution, greedy
from fastslim.search.search_folder import SearchFolder

BUDGETS = {"flops": [0.6, 0.2], "parameters": 0.3}
EVOLUTION = {"population_size": 10, "generations": 3, "top_k": 3}
METHODS = {"greedy": greedy, "evolution": lambda *args, **options: evolution(*args, **EVOLUTION, **options)}

PROGRAM = """
import sys, time
import torch
torch.set_num_threads(1)
import search_cases as cases
from test_search_folder import BUDGETS, METHODS

def metric(output, targets):
    time.sleep(0.03)
    return (output.argmax(1) == targets).float()

algo, data = cases.toy_algo(), cases.toy_data()
print("ready", flush=True)
METHODS[sys.argv[1]](algo, data, BUDGETS, metric=metric, run=sys.argv[2], resume=True, progress=False)
print("done", flush=True)
"""


def accuracy_named_metric(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == targets).float()


accuracy_named_metric.__name__ = "metric"


@pytest.mark.parametrize("method", METHODS)
def test_a_search_that_is_killed_at_random_moments_ends_with_the_same_result(method, tmp_path) -> None:
    expected = METHODS[method](
        cases.toy_algo(), cases.toy_data(), BUDGETS, metric=accuracy_named_metric, progress=False
    )
    moments = random.Random(method)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    kills, output, evaluated = 0, "", [0]
    while "done" not in output:
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, method, str(tmp_path / "run")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        ) as process:
            assert process.stdout.readline() == "ready\n"
            if kills < 3:
                time.sleep(moments.uniform(0.0, 0.3))
                process.send_signal(signal.SIGKILL)
            output = process.stdout.read()
            process.wait()
        kills += 1
        lines = tmp_path / "run" / "evaluated.jsonl"
        evaluated.append(len(lines.read_text().splitlines()) if lines.is_file() else 0)
    assert kills == 4, "the search has to be killed in the middle"
    assert evaluated == sorted(evaluated), "what was evaluated stays"
    assert evaluated[3] > 0
    report = SearchReport.load(tmp_path / "run" / "report.json")
    assert report.found == expected.found
    assert report.full == expected.full
    assert list(report.evaluated) == list(expected.evaluated)


class Interruption:
    """Accuracy, until Ctrl-C at the given call."""

    __name__ = "metric"

    def __init__(self, at: int | None = None) -> None:
        self.at, self.calls = at, 0

    def __call__(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return accuracy_named_metric(output, targets)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [1, 2, 3, 11, 30])
def test_after_ctrl_c_nothing_is_evaluated_again_but_the_decision_it_fell_into(method, at, tmp_path) -> None:
    algo, data, search = cases.toy_algo(), cases.toy_data(), METHODS[method]
    whole = Interruption()
    expected = search(algo, data, BUDGETS, metric=whole, progress=False)
    options = {"run": tmp_path / "run", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        search(algo, data, BUDGETS, metric=Interruption(at), **options)
    lines = tmp_path / "run" / "evaluated.jsonl"
    done = len(lines.read_text().splitlines()) if lines.exists() else 0
    lost = (at - 1) // cases.BATCHES - done
    assert 0 <= lost < (len(algo.mutator.mutable_units) + 1 if method == "greedy" else 1)
    rest = Interruption()
    assert search(algo, data, BUDGETS, metric=rest, resume=True, **options) == expected
    assert rest.calls == whole.calls - done * cases.BATCHES
    again = Interruption()
    assert search(algo, data, BUDGETS, metric=again, resume=True, **options) == expected
    assert again.calls == 0, "a finished search is only read"


def test_every_evaluated_subnet_stands_in_a_line_of_its_own(tmp_path) -> None:
    report = greedy(cases.toy_algo(), cases.toy_data(), BUDGETS, run=tmp_path, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "evaluated.jsonl").read_text().splitlines()]
    assert lines == [{"subnet": one.subnet, "costs": one.costs, "score": one.score} for one in report.evaluated]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["evaluated.jsonl", "report.json", "state.json"]


def test_a_line_that_was_cut_short_is_evaluated_again(tmp_path, monkeypatch) -> None:
    algo, data = cases.toy_algo(), cases.toy_data()
    expected = greedy(algo, data, BUDGETS, progress=False)
    options = {"run": tmp_path, "progress": False}
    append, appended = SearchFolder.append, []

    def stop_at_the_ninth(folder: SearchFolder, record: dict) -> None:
        append(folder, record)
        appended.append(record)
        if len(appended) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(SearchFolder, "append", stop_at_the_ninth)
    with pytest.raises(KeyboardInterrupt):
        greedy(algo, data, BUDGETS, **options)
    lines = tmp_path / "evaluated.jsonl"
    lines.write_text(lines.read_text()[:-20])
    (tmp_path / ".state.json.123.tmp").write_text("half of")
    assert greedy(algo, data, BUDGETS, resume=True, **options) == expected
    assert [json.loads(line)["score"] for line in lines.read_text().splitlines()] == [
        one.score for one in expected.evaluated
    ]
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        greedy(
            cases.toy_algo(), cases.toy_data(), {"flops": 0.3}, metric=Interruption(16), run=tmp_path, progress=False
        )
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": {"flops": 0.31}}, r"another budgets: \{'flops': \[.*\]\} there"),
        ({"algo": lambda: cases.toy_algo(steps=3)}, "another weights"),
        ({"algo": lambda: cases.toy_algo(choices=[0.5, 1.0])}, "another network"),
        ({"val_loader": cases.toy_data(seed=9)}, "another validation data"),
        ({"calibration": cases.toy_data(seed=9)}, "another calibration data"),
        ({"metric": None}, "another metric: metric there, accuracy here"),
        ({"method": METHODS["evolution"]}, "another method: greedy there, evolution here"),
        ({"resume": False}, "holds a search already: continue it with resume=True"),
    ],
)
def test_another_search_is_not_continued(interrupted, change, message) -> None:
    change = dict(change)
    method = change.pop("method", greedy)
    algo = change.pop("algo", cases.toy_algo)()
    before = {file.name: file.read_bytes() for file in interrupted.iterdir()}
    options = {
        "val_loader": cases.toy_data(),
        "budgets": {"flops": 0.3},
        "metric": Interruption(),
        "run": interrupted,
        "resume": True,
        "progress": False,
    }
    with pytest.raises(FastslimValueError, match=message):
        method(algo, **{**options, **change})
    assert {file.name: file.read_bytes() for file in interrupted.iterdir()} == before


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other"}'])
def test_a_damaged_state_is_named(interrupted, content) -> None:
    (interrupted / "state.json").write_text(content)
    with pytest.raises(FastslimFileError, match=r"state\.json (cannot be read|is not the state of a search)"):
        greedy(cases.toy_algo(), cases.toy_data(), {"flops": 0.3}, run=interrupted, resume=True, progress=False)


def test_a_folder_that_cannot_be_made_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FastslimFileError, match="cannot be used"):
        greedy(cases.toy_algo(), cases.toy_data(), {"flops": 0.3}, run=tmp_path / "file" / "run", progress=False)
