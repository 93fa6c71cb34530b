"""The command line: the demo's words, errors in one line, Ctrl-C, and missing packages."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from fastslim.cli.commands import fastslim
from fastslim.engine.config import TrainConfig
from fastslim.errors import FastslimError

# Two steps an epoch of a small net; enough to walk every path, not to learn.
SMALL = (
    "--width-mult 0.125 --choices 0.5,1 --divisor 4 --batch-size 512 --epochs 1 --warmup-epochs 0 "
    "--calibration-batches 1 --no-tensorboard"
).split()


def call(*arguments: object) -> Result:
    torch.set_num_threads(1)
    return CliRunner().invoke(fastslim, [str(argument) for argument in arguments])


def test_train_eval_and_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = call("train", "--run", run, *SMALL)
    assert first.exit_code == 0, first.output
    table = re.search(r"width   multiply-adds .*\n-+.*\n1\.00x .*\n0\.50x .*%\n", first.output)
    assert table is not None, first.output
    assert f"picture: {run}/report.png" in first.output

    again = call("train", "--run", run, *SMALL)
    assert again.exit_code == 0
    assert again.output.startswith(f"{run} is finished and was trained with these options; --overwrite trains it again")
    assert table.group() in again.output
    assert "epoch" not in again.output

    evaluated = call("eval", run)
    assert evaluated.exit_code == 0 and table.group().strip() in evaluated.output
    rows = json.loads(call("eval", run, "--widths", "1", "--json").output)
    saved = json.loads((run / "results.json").read_text())["widths"]
    assert rows == [row for row in saved if row["width"] == 1.0]


def test_every_option_of_the_configuration_is_a_flag() -> None:
    text = call("train", "--help").output
    for entry in dataclasses.fields(TrainConfig):
        assert f"--{entry.name.replace('_', '-')}" in text


@pytest.mark.parametrize("command", ["train", "eval"])
def test_help_teaches_with_examples(command: str) -> None:
    text = call(command, "--help").output
    assert "Examples:" in text and f"fastslim {command} " in text.split("Examples:")[1]
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config", "digit"), "no configuration file digit, and none ships as 'digit': did you mean 'digits'?"),
        (("--model", "resnet17"), "there is no model 'resnet17': did you mean 'resnet18'?"),
        (("--data", "folder", "--data-root", "/nowhere"), "no folder /nowhere: data_root should hold train/ and val/"),
        (("--choices", "0.5,wide"), "choices must be a number, not 'wide' (str)"),
        (("--lr", "0"), "lr=0.0: must be above 0"),
        (("--resume",), "holds no checkpoint to resume from: train without --resume"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_leave_nothing(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    run = tmp_path / "run"
    result = call("train", "--run", run, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not run.exists()


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    result = call("--debug", "train", "--run", tmp_path / "run", "--model", "resnet17")
    assert isinstance(result.exception, FastslimError)


def test_wrong_widths_are_explained(tmp_path: Path) -> None:
    result = call("eval", tmp_path, "--widths", "half")
    assert result.exit_code == 2
    assert "error: widths must be a number, not 'half' (str)" in result.stderr


def test_info_lists_versions_and_ops() -> None:
    result = call("info")
    assert result.exit_code == 0
    assert torch.__version__ in result.output and "slim_conv2d" in result.output


@pytest.mark.parametrize("package", ["click", "yaml"])
def test_missing_package_is_one_sentence(package: str) -> None:
    program = (
        "import importlib.util as util; found = util.find_spec\n"
        f"util.find_spec = lambda name, *rest: None if name == {package!r} else found(name, *rest)\n"
        "from fastslim.cli.main import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr == f"the fastslim command needs {package}: pip install 'fastslim[cli]'\n"


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [*SMALL, "--epochs", "200", "--batch-size", "64", "--log-every", "1"]
    command = [sys.executable, "-m", "fastslim", "train", "--run", str(run), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        first_lines = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    assert all("step" in line for line in first_lines), (first_lines, errors)
    assert process.returncode == 130
    assert (
        f"stopped after 0 complete epochs, everything is saved; go on with: fastslim train --run {run} --resume" in rest
    )
    assert "Traceback" not in errors
    assert {path.name for path in run.iterdir()} == {"config.yaml", "last.pt"}
    refused = call("train", "--run", run, *options)
    assert refused.exit_code == 2 and "holds an unfinished run: continue it with --resume" in refused.stderr


def test_resume_needs_no_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastslim.engine.trainer import Trainer

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        original = Trainer.save_last

        def save_last(self: Trainer) -> None:
            original(self)
            raise KeyboardInterrupt

        patch.setattr(Trainer, "save_last", save_last)
        assert call("train", "--run", run, *SMALL).exit_code != 0
    result = call("train", "--run", run, "--resume")
    assert result.exit_code == 0, result.output
    assert "1.00x" in result.output
