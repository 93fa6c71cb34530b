"""benchmarks/gpu/run.sh: its stages, their order and limits, and a rehearsal."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import first
import kernel_cases
import kernel_times
import pytest
import stages
import torch
from arithmetic import H200
from results import STAGES, Stage
from timing import Spread

from fastslim.ops import backend

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments, **variables):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    command = [ROOT / "benchmarks/gpu/run.sh", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_stages_fit_into_half_an_hour():
    assert list(stages.LIMITS) == list(STAGES) == list(stages.RUN)
    assert max(stages.LIMITS.values()) < 600
    assert sum(stages.LIMITS.values()) < 1800


def test_every_question_and_every_op_has_its_turn():
    assert stages.QUESTIONS == tuple(first.QUESTIONS)
    assert set(stages.OPS) == set(backend.registered_ops())
    assert stages.CRASHED == kernels_script().CRASHED


def kernels_script():
    """benchmarks/gpu/kernels.py; `import kernels` finds the folder of the Triton kernels."""
    spec = importlib.util.spec_from_file_location("kernels_script", ROOT / "benchmarks/gpu/kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kernel_that_crashes_the_gpu_is_left_out_of_the_next_run(tmp_path, monkeypatch):
    script = kernels_script()
    tried = []

    def measure(case, device, dtype, repeats, without):
        tried.append(sorted(without))
        if "cuda" not in without:
            raise kernel_times.CrashedError(case.op, "cuda", RuntimeError("illegal memory access"))
        return {"triton": Spread(1.0, 1.0, 1.0, 1)}, {}, []

    monkeypatch.setattr(script, "measure", measure)
    cases = [case for case in kernel_cases.small_cases() if case.op == "sandwich_loss"]
    path = tmp_path / "result.json"

    def run():
        stage = script.OpStage(Stage(path, "kernels"), "sandwich_loss", H200)
        stage.measure(cases, torch.device("cpu"), torch.float32, 1, float("inf"))
        return stage

    with pytest.raises(SystemExit) as left:
        run()
    assert left.value.code == script.CRASHED
    stage = run()
    assert tried == [[], ["cuda"]]
    assert stage.wrong
    done = json.loads(path.read_text())["stages"]["kernels"]
    assert done["tables"][1]["rows"][0][:2] == ["crashed the GPU", "cuda"]
    assert done["data"]["timed"][0]["times"] == {"triton": 1.0}


def test_rehearsal_of_a_stage_writes_its_results_beside_the_project(tmp_path):
    before = sorted((ROOT / "benchmarks/results").iterdir())
    done = run("--dry-run", "--out", tmp_path, "sanitize")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("dry-run-no-GPU-*.json")
    result = json.loads(path.read_text())
    assert result["stages"]["sanitize"]["status"] == "ok"
    assert any("--tool racecheck" in note for note in result["stages"]["sanitize"]["notes"])
    assert {"driver", "torch", "triton", "nvcc", "commit", "date"} <= set(result["machine"])
    assert "## sanitize" in path.with_suffix(".md").read_text()
    assert "depthwise_conv2d" in path.with_suffix(".log").read_text()
    assert sorted((ROOT / "benchmarks/results").iterdir()) == before


def test_rehearsal_never_writes_into_the_committed_results(monkeypatch):
    monkeypatch.setattr(stages, "RUN", dict.fromkeys(STAGES, lambda context: "ok"))
    before = sorted((ROOT / "benchmarks/results").iterdir())
    assert stages.main(["--dry-run", "--out", str(ROOT / "benchmarks/results"), "step"]) == 0
    assert sorted((ROOT / "benchmarks/results").iterdir()) == before


def test_machine_without_a_gpu_is_told_of_the_rehearsal():
    done = run("step", PATH=f"{ROOT}:/usr/bin:/bin")
    assert done.returncode == 2
    assert "needs an NVIDIA GPU: nvidia-smi is missing or finds no GPU; --dry-run rehearses" in done.stderr


def test_unknown_stage_names_the_known(capsys):
    with pytest.raises(SystemExit):
        stages.main(["--dry-run", "bench"])
    assert "no stage 'bench'; known are build, first, test, sanitize, kernels, step" in capsys.readouterr().err


def test_failing_stage_does_not_stop_the_next(tmp_path, monkeypatch):
    def broken(context):
        raise RuntimeError("no such thing")

    def killed(context):
        context.deadline = 0.0
        return stages.outcome(Stage(context.result, "test"), context.run(sys.executable, "-c", "while True: pass"))

    def missing(context):
        Stage(context.result, "sanitize").note("compute-sanitizer is missing")
        return "left out"

    monkeypatch.setitem(stages.RUN, "first", broken)
    monkeypatch.setitem(stages.RUN, "test", killed)
    monkeypatch.setitem(stages.RUN, "sanitize", missing)
    monkeypatch.setitem(stages.RUN, "kernels", lambda context: "ok")
    assert stages.main(["--dry-run", "--out", str(tmp_path), "first", "test", "sanitize", "kernels"]) == 1
    (path,) = tmp_path.glob("*.json")
    done = json.loads(path.read_text())["stages"]
    assert {name: stage["status"] for name, stage in done.items()} == {
        "first": "failed", "test": "out of time", "sanitize": "left out", "kernels": "ok"
    }  # fmt: skip
    assert done["first"]["notes"] == ["RuntimeError: no such thing"]
    assert (
        stages.main(["--dry-run", "--out", str(tmp_path), "sanitize", "kernels"]) == 0
    )  # what is missing is no failure


def test_output_of_a_failing_command_is_kept(tmp_path, monkeypatch):
    def failing(context):
        program = "print('the reason'); raise SystemExit(3)"
        return stages.outcome(Stage(context.result, "build"), context.run(sys.executable, "-c", program))

    monkeypatch.setitem(stages.RUN, "build", failing)
    assert stages.main(["--dry-run", "--out", str(tmp_path), "build"]) == 1
    (path,) = tmp_path.glob("*.json")
    build = json.loads(path.read_text())["stages"]["build"]
    assert build["status"] == "failed (exit status 3)"
    assert "the reason" in build["log"]


def test_report_of_the_tests_is_read(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="b"/>'
        '<testcase classname="a" name="c"><failure message="assert 1 == 2&#10;more"/></testcase>'
        '<testcase classname="a" name="d"><skipped message="needs a GPU"/></testcase></testsuite></testsuites>'
    )
    stage = Stage(None, "test")
    stages._report(stage, report)
    assert stage.content["notes"] == ["1 passed, 1 failed, 0 error, 1 skipped", "1 skipped: needs a GPU"]
    assert stage.content["tables"][0]["rows"] == [["a::c", "failed", "assert 1 == 2"]]
