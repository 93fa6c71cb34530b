"""Retraining: what it starts from and learns, an exact resume, and that it is the plain loop."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastslim.algorithms.calibrate import calibrate_batch_norm
from fastslim.data import make_loader, start_epoch
from fastslim.engine import retrain as module
from fastslim.engine.build import load_all_data
from fastslim.engine.checkpoint import load_checkpoint
from fastslim.engine.config import TrainConfig
from fastslim.engine.retrain import RetrainResult, default_name, retrain, retrain_options, scale_to_fewer_inputs
from fastslim.engine.run import calibration_loader, evaluate_run, evaluate_run_subnets, load_run, train
from fastslim.engine.schedule import make_optimizer, make_scheduler
from fastslim.engine.search_run import search_run
from fastslim.engine.stage_options import SearchOptions
from fastslim.engine.subnet_trainer import SubnetTrainer
from fastslim.errors import FastslimError, FastslimFileError, FastslimRuntimeError, FastslimValueError
from fastslim.export import export_subnet, load_subnet

HALF: dict[str, Any] = {"subnet": "width-0.5"}


def again(run: Path, values: dict[str, Any] = HALF, **how: Any) -> RetrainResult:
    return retrain(run, retrain_options(run, values), **how)


def metrics(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "images_per_second"} for record in records]


def assert_same(first: Path, second: Path) -> None:
    for name in ("model", "average"):
        ours, theirs = (load_checkpoint(folder / "last.pt")[name] or {} for folder in (first, second))
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0, msg=key)
    ours, theirs = (load_subnet(folder / "subnet").state_dict() for folder in (first, second))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert metrics(first) == metrics(second)


def test_results_are_before_and_after_and_the_network_is_saved(trained: Path) -> None:
    result = again(trained, {**HALF, "epochs": 4, "lr": 0.02})
    assert (result.status, result.epoch) == ("trained", 4)
    row = evaluate_run(trained, widths=[0.5])[0]
    assert (result.before.accuracy, result.before.multiply_adds) == (row.accuracy, row.multiply_adds)
    assert result.after is not None and result.after.loss < result.before.loss
    saved = json.loads((trained / "retrain" / "width-0.5" / "results.json").read_text())
    assert saved["finished"] and saved["before"] == result.before.as_dict() and saved["after"] == result.after.as_dict()
    assert saved["config"]["epochs"] == 4 and saved["config"]["choices"] == [0.25, 0.5, 1.0]
    reread = evaluate_run_subnets(trained, ["retrain/width-0.5"])[1]
    assert (reread.accuracy, reread.loss) == (result.after.accuracy, pytest.approx(result.after.loss, rel=1e-6))


def test_it_is_the_plain_loop_over_all_training_images(trained: Path) -> None:
    result = again(trained, {**HALF, "epochs": 2})
    config = retrain_options(trained, {**HALF, "epochs": 2})
    run_config, data, algo = load_run(trained)
    images = torch.stack([data.calibration[i][0] for i in range(len(data.calibration))])
    half = algo.uniform_subnet(0.5)
    calibrate_batch_norm(algo, calibration_loader(run_config, data), [half], run_config.calibration_batches)
    network = export_subnet(algo, half).train()
    whole = load_all_data(run_config)
    assert len(whole.train) == 48 and len(images) == 36  # type: ignore[arg-type]
    loader = make_loader(whole.train, config.batch_size, shuffle=True, seed=config.seed)
    optimizer = make_optimizer(network, config)
    scheduler = make_scheduler(optimizer, config, len(loader))
    for epoch in range(2):
        start_epoch(loader, epoch)
        for batch, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(batch), labels).backward()
            optimizer.step()
            scheduler.step()
    assert result.saved is not None
    saved = load_subnet(result.saved).state_dict()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(saved[name], value, msg=name)


def test_a_student_learns_the_predictions_of_the_full_width(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]] = []
    original = SubnetTrainer.losses

    def losses(self: SubnetTrainer, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        assert self.teacher is not None and not self.teacher.training
        found = original(self, images, labels)
        steps.append((images, labels, {key: value.detach() for key, value in found.items()}))
        return found

    monkeypatch.setattr(SubnetTrainer, "losses", losses)
    again(trained, {**HALF, "epochs": 1, "warmup_epochs": 0, "distill": True}, name="kd")
    assert {key for _, _, found in steps for key in found} == {"loss_kl"}
    steps.clear()
    again(trained, {**HALF, "epochs": 1, "warmup_epochs": 0, "distill": True, "student_loss": "ce+kd"}, name="both")
    assert {key for _, _, found in steps for key in found} == {"loss_kl", "loss"}
    # The first step's KL by hand: the student in training mode, the teacher calibrated at full width.
    config, data, algo = load_run(trained)
    both = [algo.mutator.max_choices, algo.uniform_subnet(0.5)]
    calibrate_batch_norm(algo, calibration_loader(config, data), both, config.calibration_batches)
    teacher, student = (export_subnet(algo, choices) for choices in both)
    images, labels, found = steps[0]
    soft, logits = teacher.eval()(images).detach(), student.train()(images).detach()
    kl = nn.functional.kl_div(logits.log_softmax(1), soft.softmax(1), reduction="batchmean")
    torch.testing.assert_close(found["loss_kl"], kl, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["loss"], nn.functional.cross_entropy(logits, labels), rtol=1e-4, atol=1e-6)


def test_from_scratch_nothing_of_the_supernet_is_left(trained: Path, tiny: TrainConfig) -> None:
    values = {**HALF, "start": "scratch", "epochs": 1, "warmup_epochs": 0}
    first = again(trained, values)
    train(tiny.replace(epochs=1, warmup_epochs=0, search_share=0.25), trained, overwrite=True)
    second = again(trained, values, name="other")
    assert first.before != second.before and first.after == second.after
    assert again(trained, {**values, "seed": 1}, name="seed").after != first.after


def test_fresh_weights_of_a_slice_make_outputs_vary_as_much_as_full_ones() -> None:
    torch.manual_seed(0)
    full = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3, groups=64))
    slim = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3, groups=32))
    with torch.no_grad():
        slim[0].weight.copy_(full[0].weight[:32, :16])
        slim[1].weight.copy_(full[1].weight[:32])
    scale_to_fewer_inputs(slim, full)
    spread = [layer(torch.randn(64, c, 8, 8)).std().item() for layer, c in ((full[0], 64), (slim[0], 16))]
    assert spread[1] == pytest.approx(spread[0], rel=0.05)
    assert torch.equal(slim[1].weight, full[1].weight[:32])


OPTIONS = [
    {},
    {"start": "scratch", "distill": True, "ema_decay": 0.9, "optimizer": "adamw", "lr": 1e-3},
    {"distill": True, "student_loss": "ce+kd", "accumulate": 2, "clip_grad_norm": 1.0, "autocast": "bf16"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "scratch-average", "distilled-accumulated"])
@pytest.mark.parametrize("steps", [2, 3], ids=["inside-an-epoch", "later"])
def test_resumed_retraining_equals_one_never_stopped(
    trained: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], steps: int
) -> None:
    values = {**HALF, "epochs": 3, **options}
    again(trained, values, name="whole")
    with monkeypatch.context() as patch:
        original = SubnetTrainer.train_step

        def train_step(self: SubnetTrainer, group: list[Any]) -> Any:
            losses = original(self, group)
            if self.step + 1 == steps:
                os.kill(os.getpid(), signal.SIGINT)
            return losses

        patch.setattr(SubnetTrainer, "train_step", train_step)
        stopped = again(trained, values, name="parts")
    assert (stopped.status, stopped.after, stopped.saved) == ("stopped", None, None)
    with pytest.raises(FastslimValueError, match="holds an unfinished run: continue it with --resume"):
        again(trained, values, name="parts")
    torch.manual_seed(99)
    assert again(trained, values, name="parts", resume=True).status == "trained"
    assert_same(trained / "retrain" / "whole", trained / "retrain" / "parts")


def test_finished_retraining_is_not_done_again(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = again(trained)
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_run", lambda *_, **__: pytest.fail("a finished retraining was begun again"))
        second = again(trained, {**HALF, "workers": 1})
        assert again(trained, resume=True).status == "finished before"
    assert second.status == "finished before"
    assert (second.before, second.after, second.saved) == (first.before, first.after, first.saved)
    with pytest.raises(
        FastslimValueError, match=r"with other options \(lr: 0\.05 there, 0\.1 here\): choose another --name"
    ):
        again(trained, {**HALF, "lr": 0.1})
    assert again(trained, {**HALF, "lr": 0.1}, name="faster").status == "trained"


def test_a_name_that_means_another_subnet_now_is_noticed(trained: Path) -> None:
    search = SearchOptions(budget={"flops": [0.5]}, score="loss")
    search_run(trained, search, progress=False)
    again(trained, {"subnet": "flops-0.5", "epochs": 1, "warmup_epochs": 0})
    report = trained / "search" / "report.json"
    content = json.loads(report.read_text())
    name, width = next(iter(content["found"][0]["subnet"].items()))
    content["found"][0]["subnet"][name] = 2 if width != 2 else 4
    report.write_text(json.dumps(content))
    with pytest.raises(
        FastslimValueError, match="was trained from another supernet or subnet, which have changed since"
    ):
        again(trained, {"subnet": "flops-0.5", "epochs": 1, "warmup_epochs": 0})


def test_checkpoint_of_another_supernet_is_not_continued(
    trained: Path, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_subnet", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            again(trained)
    train(tiny.replace(epochs=2, search_share=0.25, seed=4), trained, overwrite=True)
    values = {**HALF, "seed": 0}
    with pytest.raises(FastslimFileError, match="began with another supernet or subnet, which have changed since"):
        again(trained, values, resume=True)
    assert again(trained, values, overwrite=True).status == "trained"


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = SubnetTrainer.losses

    def losses(self: SubnetTrainer, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = original(self, images, labels)
        return {key: value * float("nan") for key, value in found.items()} if self.step == 4 else found

    monkeypatch.setattr(SubnetTrainer, "losses", losses)
    with pytest.raises(
        FastslimRuntimeError, match=r"the loss of width-0\.5 is nan in step 5: lower lr .* with --resume"
    ):
        again(trained, {**HALF, "epochs": 3})
    state = load_checkpoint(trained / "retrain" / "width-0.5" / "last.pt")
    assert state["step"] == 3 and all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "which subnet? give --subnet NAME; `fastslim search"),
        ({"subnet": "flops-0.5"}, "there is no subnet or file 'flops-0.5'"),
        ({"subnet": "width-0.5", "device": "tpu"}, "device: 'tpu' is not a device"),
        ({"subnet": "width-0.5", "epoch": 3}, "unknown key 'epoch' in the options: did you mean 'epochs'?"),
        (
            {"subnet": "width-0.5", "model": "resnet50"},
            "model='resnet50' in the options: the supernet was trained with",
        ),
        ({"subnet": "width-0.5", "batch_size": 1}, "batch_size=1: must be at least 2"),
    ],
)
def test_mistakes_are_explained_and_leave_nothing(trained: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(FastslimError) as caught:
        again(trained, values)
    assert message in str(caught.value)
    assert not (trained / "retrain").exists() or not any((trained / "retrain").iterdir())


def test_the_supernet_of_the_run_is_left_as_it_was(trained: Path) -> None:
    before = {path: path.read_bytes() for path in trained.iterdir()}
    again(trained)
    assert {path: path.read_bytes() for path in trained.iterdir() if path.is_file()} == before


def test_what_a_kill_left_while_the_network_was_saved_is_removed(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained / "retrain" / "width-0.5"
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_subnet", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            again(trained)
    half = folder / ".subnet.77.tmp" / "subnet"
    half.mkdir(parents=True)
    (half / "weights.safetensors").write_bytes(b"half of it")
    (folder / ".last.pt.77.tmp").write_bytes(b"half of it")
    assert again(trained, resume=True).status == "trained"
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("subnet", "name"),
    [("flops-0.5", "flops-0.5"), ("retrain/flops-0.5", "flops-0.5"), ("a/flops-0.5/subnet", "flops-0.5"),
     ("a/mine-0.5.json", "mine-0.5"), ("mine.yaml", "mine")],
)  # fmt: skip
def test_the_folder_is_called_after_the_subnet(tmp_path: Path, subnet: str, name: str) -> None:
    assert default_name(tmp_path, subnet) == name


def test_a_network_that_was_trained_before_is_trained_on_with_its_own_weights(trained: Path) -> None:
    first = again(trained)
    assert first.after is not None
    second = again(trained, {"subnet": "retrain/width-0.5", "epochs": 1, "warmup_epochs": 0, "lr": 1e-9}, name="more")
    assert second.after is not None and second.before.loss == pytest.approx(first.after.loss, rel=1e-5)
    ours, theirs = (load_subnet(result.saved).state_dict() for result in (first, second) if result.saved)
    for key in ours:
        if "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-6, msg=key)
