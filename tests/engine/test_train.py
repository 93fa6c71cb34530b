"""A whole run: what it learns, what it leaves on disk, and that stopping and resuming changes no bit."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastslim.engine import run as run_module
from fastslim.engine.checkpoint import load_checkpoint
from fastslim.engine.config import TrainConfig, load_config
from fastslim.engine.run import evaluate_run, train
from fastslim.engine.trainer import Trainer
from fastslim.errors import FastslimError, FastslimFileError, FastslimRuntimeError, FastslimValueError

RUN_FILES = {"best.pt", "config.yaml", "curves.png", "last.pt", "metrics.jsonl", "report.png", "results.json"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def weights(run: Path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(run / "last.pt")
    flat = dict(state["model"])
    for index, entry in state["optimizer"]["state"].items():
        flat |= {
            f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in entry.items() if value is not None
        }
    flat |= {f"average.{key}": torch.as_tensor(value) for key, value in (state["average"] or {}).items()}
    return flat


def metrics(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "images_per_second"} for record in records]


def assert_same_run(first: Path, second: Path) -> None:
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert metrics(first) == metrics(second)


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, number: int = signal.SIGINT) -> None:
    """Sends a signal to this process during the given step, as Ctrl-C does."""
    original = Trainer.train_step

    def train_step(self: Trainer, group: list[Any]) -> Any:
        losses = original(self, group)
        if self.step + 1 == steps:
            os.kill(os.getpid(), number)
        return losses

    monkeypatch.setattr(Trainer, "train_step", train_step)


def test_run_learns_and_leaves_its_folder(
    tiny: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(tiny.replace(epochs=8), tmp_path / "run")
    assert result.status == "trained" and result.epoch == 8
    assert names(tmp_path / "run") == RUN_FILES
    assert [row.width for row in result.widths] == [0.25, 0.5, 1.0]
    assert all(row.accuracy > 0.8 for row in result.widths), result.widths
    assert load_config(tmp_path / "run" / "config.yaml") == tiny.replace(epochs=8)
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    assert saved["finished"] is True
    assert saved["widths"] == [row.as_dict() for row in result.widths]
    out = capsys.readouterr().out
    assert re.search(r"epoch   8/8  max \d\.\d{3}  min \d\.\d{3}  random \d\.\d{3}  \d+ images/s  0\.25x", out)


def test_costs_of_the_table_are_those_of_the_sliced_net(tiny: TrainConfig, tmp_path: Path) -> None:
    rows = {row.width: row for row in train(tiny.replace(epochs=1, warmup_epochs=0), tmp_path / "run").widths}
    for width, (a, b, c) in {0.25: (2, 4, 4), 0.5: (4, 8, 8), 1.0: (8, 16, 16)}.items():
        kernels = 9 * (a + a * b + b * c)
        assert rows[width].multiply_adds == 36 * kernels + 3 * 36 * c
        assert rows[width].parameters == kernels + 2 * (a + b + c) + 3 * 36 * c + 3


def test_equal_seeds_give_equal_runs_and_others_do_not(tiny: TrainConfig, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name) + seed)
        train(tiny.replace(seed=seed), tmp_path / name)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert metrics(tmp_path / "a") != metrics(tmp_path / "c")


OPTIONS = [
    {},
    {"optimizer": "adamw", "lr": 1e-3, "ema_decay": 0.9, "augment": False},
    {"accumulate": 2, "clip_grad_norm": 1.0, "lr_schedule": "step"},
    {"autocast": "bf16", "random_widths": "uniform", "grad_reduction": "mean", "student_loss": "ce+kd"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["sgd", "adamw-average", "accumulate-clip", "bf16"])
@pytest.mark.parametrize("steps", [2, 3], ids=["inside-an-epoch", "at-its-end"])
def test_resumed_run_equals_one_never_stopped(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], steps: int
) -> None:
    config = tiny.replace(**options)
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        stopped = train(config, tmp_path / "parts")
    assert stopped.status == "stopped" and stopped.epoch < 3
    assert names(tmp_path / "parts") >= {"config.yaml", "last.pt"}
    assert "results.json" not in names(tmp_path / "parts")
    torch.manual_seed(99)
    np.random.seed(99)
    assert train(config, tmp_path / "parts", resume=True).status == "trained"
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert names(tmp_path / "parts") == RUN_FILES


def test_run_killed_after_its_checkpoint_writes_no_record_twice(tiny: TrainConfig, tmp_path: Path) -> None:
    train(tiny, tmp_path / "whole")
    run = tmp_path / "killed"

    class Killed(BaseException):
        pass

    original = Trainer.save_last

    def save_last(self: Trainer) -> None:
        if self.epoch == 2:
            raise Killed  # the metrics of epoch 2 are written, its checkpoint is not
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "save_last", save_last)
        with pytest.raises(Killed):
            train(tiny, run)
    assert [record["epoch"] for record in metrics(run) if record["kind"] == "epoch"] == [1, 2]
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "epoch", "ep')  # a line cut short by the kill
    (run / ".last.pt.77.tmp").write_bytes(b"half a checkpoint")
    train(tiny, run, resume=True)
    assert_same_run(tmp_path / "whole", run)
    assert names(run) == RUN_FILES


def test_finished_run_is_not_trained_again(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(tiny, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "build_supernet", lambda *_: pytest.fail("a finished run was trained again"))
        again = train(tiny.replace(workers=1, log_every=7), tmp_path / "run")
        assert train(tiny, tmp_path / "run", resume=True).status == "finished before"
    assert (again.status, again.widths) == ("finished before", first.widths)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before
    (tmp_path / "run" / "report.html").touch()
    assert train(tiny, tmp_path / "run", overwrite=True).status == "trained"
    assert not (tmp_path / "run" / "report.html").exists()  # it was about the run before


def test_missing_picture_of_a_finished_run_is_drawn_again(tiny: TrainConfig, tmp_path: Path) -> None:
    train(tiny.replace(epochs=1), tmp_path / "run")
    (tmp_path / "run" / "report.png").unlink()
    assert train(tiny.replace(epochs=1), tmp_path / "run").status == "finished before"
    assert names(tmp_path / "run") == RUN_FILES


def test_other_options_are_not_mixed_into_a_run(tiny: TrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny, run)
    before = {path: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(FastslimValueError, match=r"holds a run with other options \(epochs: 3 there, 4 here\): choose"):
        train(tiny.replace(epochs=4), run)
    with pytest.raises(FastslimValueError, match=r"was trained with other options \(lr: 0\.05 there, 0\.1 here\)"):
        train(tiny.replace(lr=0.1), run, resume=True)
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_unfinished_run_asks_for_resume(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 1, signal.SIGTERM)
        assert train(tiny, tmp_path / "run").status == "stopped"
    with pytest.raises(FastslimValueError, match="holds an unfinished run: continue it with --resume"):
        train(tiny, tmp_path / "run")
    with pytest.raises(FastslimValueError, match="choose one"):
        train(tiny, tmp_path / "run", resume=True, overwrite=True)


def test_nothing_to_resume_is_said_and_nothing_left(tiny: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(FastslimValueError, match="holds no checkpoint to resume from: train without --resume"):
        train(tiny, tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_run_killed_before_its_first_checkpoint_begins_again(tiny: TrainConfig, tmp_path: Path) -> None:
    train(tiny, tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    tiny.save(tmp_path / "killed" / "config.yaml")
    assert train(tiny, tmp_path / "killed", resume=True).status == "trained"
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_second_ctrl_c_interrupts_at_once(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)

    def train_step(self: Trainer, group: list[Any]) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("broken", ["model", "data"])
def test_bad_run_leaves_no_folder(tiny: TrainConfig, tmp_path: Path, broken: str) -> None:
    with pytest.raises(FastslimError):
        train(tiny.replace(**{broken: "tiny_run:missing"}), tmp_path / "new" / "run")
    assert not (tmp_path / "new" / "run").exists()


@pytest.mark.parametrize("place", ["a file", "under a file"])
def test_unwritable_run_folder_is_refused_before_training(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").write_text("precious")
    run = tmp_path / "file" if place == "a file" else tmp_path / "file" / "run"
    monkeypatch.setattr(run_module, "build_data", lambda _: pytest.fail("data was loaded first"))
    with pytest.raises(
        FastslimFileError, match=rf"the run folder {run} cannot be written to \(.*\): choose another --run"
    ):
        train(tiny, run)
    assert (tmp_path / "file").read_text() == "precious"
    assert names(tmp_path) == {"file", "modules"}


def test_folder_without_write_permission_is_refused(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)  # root may write everywhere, so the bits alone prove nothing
    with pytest.raises(FastslimFileError, match=r"cannot be written to \(Permission denied\): choose another --run"):
        train(tiny, tmp_path / "run")


def test_config_of_another_program_is_not_overwritten(tiny: TrainConfig, tmp_path: Path) -> None:
    foreign = tmp_path / "config.yaml"
    foreign.write_text("services: [web]\n")
    with pytest.raises(FastslimFileError, match="is not a folder of fastslim's .*: choose another --run"):
        train(tiny, tmp_path)
    assert foreign.read_text() == "services: [web]\n"


def test_truncated_checkpoint_stops_the_resume(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        train(tiny, tmp_path / "run")
    last = tmp_path / "run" / "last.pt"
    last.write_bytes(last.read_bytes()[:5000])
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(FastslimFileError, match=r"last\.pt is truncated \(5000 bytes\)"):
        train(tiny, tmp_path / "run", resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_checkpoint_of_another_model_stops_the_resume(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny.replace(model="tiny_run:build_wider")
    train(other, tmp_path / "other")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        train(tiny, tmp_path / "run")
    (tmp_path / "run" / "last.pt").write_bytes((tmp_path / "other" / "last.pt").read_bytes())
    with pytest.raises(
        FastslimFileError,
        match=r"is the checkpoint of another model: it has no '3\.weight'; its '0\.bias'",
    ):
        train(tiny, tmp_path / "run", resume=True)


def test_nan_in_a_batch_names_the_pass_and_keeps_the_checkpoint(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.train_step

    def train_step(self: Trainer, group: list[Any]) -> Any:
        if self.step == 4:
            group[0][0][1, 0, 0, 0] = float("nan")
        return original(self, group)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(FastslimError, match=r"max_subnet pass.*samples \[1\]"):
        train(tiny, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 3
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


def test_evaluating_again_gives_the_same_numbers(tiny: TrainConfig, tmp_path: Path) -> None:
    for options in ({}, {"ema_decay": 0.9}):
        run = tmp_path / f"run{len(options)}"
        result = train(tiny.replace(**options), run)
        assert evaluate_run(run) == result.widths
        before = names(run)
        evaluate_run(run, checkpoint="best", widths=[0.5])
        assert names(run) == before


def test_wrong_evaluation_is_explained(tiny: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(FastslimFileError, match="there is no run folder"):
        evaluate_run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FastslimFileError, match=r"there is no checkpoint \S*last\.pt"):
        evaluate_run(tmp_path / "empty")
    train(tiny.replace(epochs=1, warmup_epochs=0), tmp_path / "run")
    with pytest.raises(FastslimValueError, match=r"width 1\.5 is not a ratio above 0 and up to 1"):
        evaluate_run(tmp_path / "run", widths=[1.5])
    with pytest.raises(FastslimValueError, match="choose 'last' or 'best'"):
        evaluate_run(tmp_path / "run", checkpoint="first")


def test_missing_matplotlib_costs_the_pictures_only(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    result = train(tiny.replace(epochs=1, warmup_epochs=0), tmp_path / "run")
    assert result.pictures == []
    assert names(tmp_path / "run") == RUN_FILES - {"report.png", "curves.png"}


def test_impossible_device_is_named(tiny: TrainConfig, tmp_path: Path) -> None:
    for device, message in {"tpu3": "is not a device", "cuda:9": "is not here", "meta": "is not supported"}.items():
        with pytest.raises(FastslimValueError, match=f"device: '{device}' {message}.*: use auto"):
            train(tiny.replace(device=device), tmp_path / "run")


def test_model_function_must_return_a_module(tiny: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(FastslimError, match="tiny_run:load must return a torch.nn.Module, not a tuple"):
        train(tiny.replace(model="tiny_run:load"), tmp_path / "run")


def test_untraceable_model_is_explained(tiny: TrainConfig, tiny_module: Path, tmp_path: Path) -> None:
    (tiny_module / "tiny_wild.py").write_text(
        "from torch import nn\n"
        "class Wild(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(1, 4, 3)\n"
        "    def forward(self, x):\n"
        "        if x.sum() > 0:\n"
        "            raise ValueError('not these images')\n"
        "        return self.conv(x).mean((2, 3)).tolist()\n"
        "def build(num_classes): return Wild()\n"
    )
    with pytest.raises(FastslimRuntimeError) as caught:
        train(tiny.replace(model="tiny_wild:build"), tmp_path / "run")
    assert "tiny_wild.py" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_tensorboard_files_are_written_where_it_is_installed(tiny: TrainConfig, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny.replace(tensorboard=True), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"lr", "loss/max_subnet.loss", "accuracy/0.25x"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("accuracy/1.00x")] == [3, 6, 9]
