"""The result file of benchmarks/gpu/run.sh."""

from __future__ import annotations

import json

import pytest
import results
from results import Result, Stage

ABOUT = {"device": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0", "commit": "abc1234", "date": "today"}


@pytest.fixture
def path(tmp_path):
    result = Result(tmp_path / "NVIDIA-H200-abc1234.json")
    result.content["machine"] = dict(ABOUT)
    result.save()
    return result.path


def test_every_addition_is_written_at_once(path):
    stage = Stage(path, "kernels")
    stage.start()
    assert json.loads(path.read_text())["stages"]["kernels"]["status"] == "started, but did not end"
    stage.table("depthwise", ["shape", "us"], [["144 ch", 27.123]])
    assert "| 144 ch | 27.1 |" in path.with_suffix(".md").read_text()  # a run killed here keeps the table
    stage.end("ok", 12.34)
    page = path.with_suffix(".md").read_text()
    assert page.startswith("# NVIDIA H200, commit abc1234")
    assert "driver 580.1, torch 2.11.0, date today" in page
    assert "| kernels | ok | 12.3 |" in page


def test_stages_of_several_processes_stand_in_one_file(path):
    for name in ("step", "build"):
        stage = Stage(path, name)
        stage.start()
        stage.note(f"note of {name}")
        stage.end("ok", 1)
    page = path.with_suffix(".md").read_text()
    assert page.index("## build") < page.index("## step")
    assert "- note of build" in page


def test_second_run_of_a_stage_replaces_the_first(path):
    for value in (1, 2):
        stage = Stage(path, "first")
        stage.start()
        stage.table("answers", ["value"], [[value]])
        stage.table("answers", ["value"], [[value + 10]])
    (table,) = json.loads(path.read_text())["stages"]["first"]["tables"]
    assert table["rows"] == [[12]]


def test_file_is_never_half_written(path, monkeypatch):
    before = path.read_text()
    stage = Stage(path, "kernels")
    stage.content["data"] = {"unwritable": object()}
    with pytest.raises(TypeError):
        stage.result.save()
    assert path.read_text() == before
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, path.with_suffix(".md").name]


def test_cells_cannot_break_the_table(path):
    stage = Stage(path, "first")
    stage.table("t", ["a", "b"], [["x|y\nz", None]])
    assert "| x\\|y z |  |" in path.with_suffix(".md").read_text()


def test_numbers_stand_right_and_keep_three_digits(path):
    stage = Stage(path, "first")
    stage.table("t", ["name", "value"], [["a", 0.123456], ["b", 1234.5], ["c", None]])
    page = path.with_suffix(".md").read_text()
    assert "|---|--:|" in page
    assert "| a | 0.123 |\n| b | 1234 |\n| c |  |" in page


def test_pieces_of_a_run_are_merged(tmp_path, path, capsys):
    Stage(path, "build").end("ok", 1)
    other = tmp_path / "second.json"
    other.write_text(json.dumps({"machine": ABOUT, "stages": {"step": {"status": "ok"}}}))
    results.main(str(tmp_path / "whole"), str(path), str(other))
    results.main(str(tmp_path / "whole"), str(other))  # adds to what is there
    whole = json.loads((tmp_path / "whole" / "NVIDIA-H200-abc1234.json").read_text())
    assert list(whole["stages"]) == ["build", "step"]


def test_pieces_of_different_commits_are_refused():
    contents = [{"machine": {"device": "a", "commit": commit}, "stages": {}} for commit in ("one", "two")]
    with pytest.raises(SystemExit, match="different commits: one and two"):
        results.merged(contents)


def test_machine_without_a_gpu_is_described(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("FASTSLIM_COMMIT", "f00")
    about = results.machine()
    assert about["device"] == "no GPU"
    assert about["commit"] == "f00"  # git is not found either
    assert results.stem(about) == "no-GPU-f00"
    assert results.stem(ABOUT) == "NVIDIA-H200-abc1234"
