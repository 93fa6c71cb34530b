"""Processes of a group share the work of a search, and all come to the result of one alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import search_cases as cases
import torch
from search_rank import BUDGETS, EVOLUTION

from fastslim.search import evolution, greedy
from fastslim.search.processes import Processes


def run_together(folder: Path, case: str, size: int = 2) -> list[dict]:
    """What the processes of a group left."""
    script = Path(__file__).with_name("search_rank.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    rendezvous = folder / f"{case}.rendezvous"
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(size), str(rendezvous), str(folder), case],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(outputs)
    return [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in range(size)]


def metric(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    metric.calls += 1
    return (output.argmax(1) == targets).float()


@pytest.mark.parametrize(("case", "size"), [("greedy", 2), ("evolution", 2), ("greedy", 3)])
def test_all_processes_decide_as_one_alone_and_only_the_first_writes(case, size, tmp_path) -> None:
    metric.calls = 0
    method = {"greedy": greedy, "evolution": evolution}[case]
    options = EVOLUTION if case == "evolution" else {}
    alone = method(cases.toy_algo(), cases.toy_data(), BUDGETS, metric=metric, progress=False, **options)
    results = run_together(tmp_path, case, size)
    expected = json.loads(json.dumps(alone.as_dict()))
    assert all(result["report"] == expected for result in results)
    assert sum(result["calls"] for result in results) == metric.calls, "every subnet is evaluated by one process"
    assert all(result["calls"] < 0.8 * metric.calls for result in results)
    assert (tmp_path / "run0" / "report.json").exists()
    assert not (tmp_path / "run1").exists()


def test_a_search_of_a_group_goes_on_where_it_stopped(tmp_path) -> None:
    stopped = run_together(tmp_path, "interrupted")
    assert any("KeyboardInterrupt" in result["error"] for result in stopped)
    assert all(result["error"] for result in stopped), "the other one learns that its partner is gone"
    results = run_together(tmp_path, "greedy")
    alone = greedy(cases.toy_algo(), cases.toy_data(), BUDGETS, progress=False)
    found = json.loads(json.dumps(alone.as_dict()))["found"]
    assert [result.get("error") for result in results] == [None, None]
    assert all(result["report"]["found"] == found for result in results)
    metric.calls = 0
    greedy(cases.toy_algo(), cases.toy_data(), BUDGETS, metric=metric, progress=False)
    assert sum(result["calls"] for result in results) < metric.calls, "what was evaluated is not evaluated again"


def test_no_process_waits_for_one_that_failed(tmp_path) -> None:
    first, second = run_together(tmp_path, "failing")
    assert second["error"] == "ArithmeticError: the second process fails"
    assert first["error"] == "FastslimRuntimeError: another process of the group has failed, see its message"


def test_processes_with_other_data_are_refused(tmp_path) -> None:
    for result in run_together(tmp_path, "other data"):
        assert "the processes of the group have different validation data" in result["error"]
        assert "no DistributedSampler" in result["error"]


def test_one_process_does_all_the_work_itself() -> None:
    alone = Processes(torch.device("cpu"))
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.share([1, 2], lambda items: [2.0 * item for item in items]) == [2.0, 4.0]
    assert alone.from_first(lambda: "made") == "made"
