"""The report of a search: what it answers, how it prints, and that it survives a file."""

from __future__ import annotations

import json

import pytest
import search_cases as cases

import fastslim
from fastslim.errors import FastslimFileError, FastslimValueError
from fastslim.search import SearchReport, evolution, greedy

EVOLUTION = {"population_size": 8, "generations": 3, "top_k": 3}


@pytest.fixture
def algo() -> fastslim.AutoSlim:
    return cases.toy_algo()


@pytest.fixture
def data() -> list:
    return cases.toy_data()


def test_a_report_saves_loads_and_prints(algo, data, tmp_path) -> None:
    for search, options in ((greedy, {}), (evolution, EVOLUTION)):
        report = search(algo, data, {"flops": [0.5, 0.25], "parameters": 1200}, progress=False, **options)
        report.save(tmp_path / "report.json")
        assert SearchReport.load(tmp_path / "report.json") == report
        lines = str(report).splitlines()
        assert lines[0] == f"{report.method} search, {len(report.evaluated)} subnets evaluated"
        assert [line.split("   ")[0].strip() for line in lines[3:]] == [
            "full network",
            "flops 50 %",
            "flops 25 %",
            "parameters 1.20 k",
        ]
        assert len({len(line) for line in lines[1:]}) == 1, "columns are aligned"
        assert lines[1].endswith("accuracy")
        assert lines[-1].endswith(f"{report.found[-1].score:.4f}")


def test_the_front_holds_what_no_other_subnet_beats(algo, data) -> None:
    report = evolution(algo, data, {"flops": [0.9]}, progress=False, **EVOLUTION)
    for cost in ("flops", "parameters"):
        front = report.front(cost)
        beaten = [
            one
            for one in report.evaluated
            if any(
                other.costs[cost] <= one.costs[cost]
                and other.score >= one.score
                and (other.costs[cost], other.score) != (one.costs[cost], one.score)
                for other in report.evaluated
            )
        ]
        assert all(one not in beaten for one in front)
        kept = {(one.costs[cost], one.score) for one in report.evaluated if one not in beaten}
        assert {(one.costs[cost], one.score) for one in front} == kept
        assert [one.costs[cost] for one in front] == sorted(one.costs[cost] for one in front)


def test_a_budget_that_was_not_searched_for_is_named(algo, data) -> None:
    report = greedy(algo, data, {"flops": [0.5, 0.25]}, progress=False)
    with pytest.raises(FastslimValueError, match="budget of 0.4 of flops; there are: flops 0.5, flops 0.25"):
        report.best("flops", 0.4)
    with pytest.raises(FastslimValueError, match="there are: flops 0.5, flops 0.25"):
        report.best("params", 0.5)
    with pytest.raises(FastslimValueError, match="did you mean 'flops'"):
        report.best("flopps", 0.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "SearchReport.save writes"),
        (json.dumps({"format": "fastslim-search-report-1"}), "damaged search report"),
    ],
)
def test_a_foreign_file_is_no_report(tmp_path, content, message) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(FastslimFileError, match=message):
        SearchReport.load(tmp_path / "report.json")
