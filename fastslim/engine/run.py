"""`train` and `evaluate_run`: a run from its configuration to its results, and back from its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from fastslim.algorithms import AutoSlim
from fastslim.data import ImageData, make_loader, start_epoch
from fastslim.engine.build import build_data, build_supernet, choose_device
from fastslim.engine.checkpoint import load_checkpoint, load_model
from fastslim.engine.config import TrainConfig
from fastslim.engine.evaluate import (
    SubnetResult,
    WidthResult,
    accuracy_and_loss,
    evaluate_named,
    evaluate_widths,
    spaced_widths,
)
from fastslim.engine.options import differences
from fastslim.engine.plot import plot_curves, plot_widths
from fastslim.engine.run_folder import RunFolder, check_entry
from fastslim.engine.stage_folder import origin
from fastslim.engine.stage_options import check_widths
from fastslim.engine.subnets import choose_subnet
from fastslim.engine.trainer import Trainer
from fastslim.errors import FastslimError, FastslimFileError, FastslimRuntimeError, FastslimValueError
from fastslim.files import write_atomically


@dataclass(frozen=True)
class RunResult:
    """How a call of `train` ended.

    Attributes:
        folder: of the run.
        status: ``"trained"``, ``"finished before"`` (nothing was trained) or ``"stopped"`` (by a signal; resumable).
        epoch: complete epochs.
        widths: the evaluated subnets; empty after ``"stopped"``.
        pictures: files that were drawn.
    """

    folder: RunFolder
    status: Literal["trained", "finished before", "stopped"]
    epoch: int
    widths: list[WidthResult]
    pictures: list[Path]


def train(config: TrainConfig, run: Path | str, *, resume: bool = False, overwrite: bool = False) -> RunResult:
    """Trains a supernet and leaves everything about it in a folder.

    A run that is finished with the same configuration is not trained again.

    Args:
        config: all options.
        run: the run's folder; created if needed.
        resume: go on from ``last.pt``; on a CPU the weights end bit for bit as if the run had never stopped.
        overwrite: replace the run that is in the folder.

    Raises:
        FastslimError: anything that cannot work, before time is spent on it; the message names the fix.
    """
    folder = RunFolder(run)
    if overwrite and resume:
        raise FastslimValueError("--resume goes on with a run, --overwrite starts it anew: choose one")
    if not overwrite:
        finished, saved = folder.finished_results(), folder.saved_config()
        if finished and saved and not differences(saved, config):
            return finished_before(folder, config, finished)
        check_entry(folder, config, resume)
    folder.prepare()
    try:
        device = choose_device(config.device)
        data = build_data(config)
        algo = build_supernet(config, data, device)
        state = load_checkpoint(folder.last) if resume and folder.last.is_file() else None
        trainer = Trainer(config, data, algo, folder)
        if state:
            trainer.load(state)
        else:
            folder.clear()
            config.save(folder.config)
    except FastslimError:
        folder.remove_if_empty()
        raise
    if not trainer.fit():
        return RunResult(folder, "stopped", trainer.epoch, [], [])
    widths = trainer.results or trainer.evaluate()
    write_results(folder, config, widths, trainer.seconds)
    return RunResult(folder, "trained", trainer.epoch, widths, draw(folder, config, widths))


def finished_before(folder: RunFolder, config: TrainConfig, results: dict[str, Any]) -> RunResult:
    """The results of an earlier run; pictures are drawn again where they are missing."""
    widths = [WidthResult(**row) for row in results["widths"]]
    pictures = [folder.report, folder.curves]
    if not all(picture.is_file() for picture in pictures):
        pictures = draw(folder, config, widths)
    return RunResult(folder, "finished before", config.epochs, widths, pictures)


def write_results(folder: RunFolder, config: TrainConfig, widths: list[WidthResult], seconds: float) -> None:
    """results.json: that the run is finished, its table, and where the numbers come from."""
    results = {
        "finished": True,
        "widths": [row.as_dict() for row in widths],
        "training_seconds": round(seconds, 1),
        **origin(),
        "config": config.as_dict(),
    }
    write_atomically(folder.results, json.dumps(results, indent=2) + "\n")


def draw(folder: RunFolder, config: TrainConfig, widths: list[WidthResult]) -> list[Path]:
    """report.png and curves.png; none, where matplotlib is not installed."""
    try:
        plot_widths(folder.report, widths, data=config.data, model=config.model)
        plot_curves(folder.curves, folder.read_metrics())
    except FastslimRuntimeError:
        return []
    return [folder.report, folder.curves]


def load_run(
    run: Path | str, *, checkpoint: str = "last", device: str = "auto"
) -> tuple[TrainConfig, ImageData, AutoSlim]:
    """The supernet of a run, with the weights that were evaluated.

    Args:
        run: the run's folder.
        checkpoint: ``"last"`` or ``"best"``.
        device: auto, cpu, cuda or cuda:1.

    Returns:
        Configuration, data and supernet.

    Raises:
        FastslimFileError: no run there, or an unreadable checkpoint.
    """
    folder = RunFolder(run)
    if not folder.path.is_dir():
        raise FastslimFileError(f"there is no run folder {folder.path}")
    if checkpoint not in ("last", "best"):
        raise FastslimValueError(f"checkpoint={checkpoint!r}: choose 'last' or 'best'")
    path = folder.last if checkpoint == "last" else folder.best
    state = load_checkpoint(path)
    config = TrainConfig.from_mapping(state["config"], str(path))
    data = build_data(config)
    algo = build_supernet(config, data, choose_device(device))
    load_model(algo.architecture, {**state["model"], **averaged_weights(state)}, path)
    return config, data, algo


def averaged_weights(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The averaged parameters of a checkpoint; empty where none were kept."""
    return {key: value for key, value in (state.get("average") or {}).items() if key != "updates"}


def evaluate_run(
    run: Path | str,
    *,
    widths: list[float] | None = None,
    checkpoint: str = "last",
    calibrate: bool = True,
    device: str = "auto",
) -> list[WidthResult]:
    """Evaluates a run's supernet again.

    Args:
        run: the run's folder.
        widths: ratios; unset: those of the run's configuration.
        checkpoint: ``"last"`` or ``"best"``.
        calibrate: compute BN statistics for each width first. Without it, narrow widths are broken.
        device: auto, cpu, cuda or cuda:1.

    Raises:
        FastslimFileError: no run there, or an unreadable checkpoint.
        FastslimValueError: a width that is not a ratio.
    """
    check_widths(tuple(widths or ()))
    config, data, algo = load_run(run, checkpoint=checkpoint, device=device)
    return evaluate_widths(
        algo,
        held_out_loader(config, data),
        widths or spaced_widths(config.choices, config.eval_widths),
        calibration=calibration_loader(config, data) if calibrate else None,
        calibration_batches=config.calibration_batches or None,
    )


def evaluate_run_subnets(
    run: Path | str, subnets: Sequence[str], *, checkpoint: str = "last", calibrate: bool = True, device: str = "auto"
) -> list[SubnetResult]:
    """Evaluates subnets by name; the full network comes first.

    Args:
        run: the run's folder.
        subnets: as `fastslim.engine.subnets.choose_subnet` takes them. A file with weights of its own is evaluated
            with those, whatever the checkpoint.
        checkpoint: see `evaluate_run`.
        calibrate: see `evaluate_run`.
        device: see `evaluate_run`.

    Returns:
        One result a subnet, called as it was given, after that of the full network.

    Raises:
        FastslimFileError: no run there, an unreadable checkpoint, or the subnet of another network.
        FastslimValueError: there is no such subnet.
    """
    config, data, algo = load_run(run, checkpoint=checkpoint, device=device)
    chosen = {text: choose_subnet(Path(run), algo, text) for text in subnets}
    loader = held_out_loader(config, data)
    own = {text: subnet for text, subnet in chosen.items() if subnet.network is not None}
    found = evaluate_named(
        algo,
        loader,
        {"full": algo.mutator.max_choices, **{text: c.choices for text, c in chosen.items() if text not in own}},
        calibration=calibration_loader(config, data) if calibrate else None,
        calibration_batches=config.calibration_batches or None,
    )
    by_text = {row.name: row for row in found}
    for text, subnet in own.items():
        assert subnet.network is not None
        cost = algo.subnet_cost(subnet.choices)
        scores = accuracy_and_loss(subnet.network.eval(), loader)
        by_text[text] = SubnetResult(text, cost.multiply_adds, cost.parameters, *scores)
    return [by_text[text] for text in ("full", *chosen)]


def held_out_loader(config: TrainConfig, data: ImageData) -> DataLoader[Any]:
    """Batches of the held-out images."""
    return make_loader(data.val, max(config.batch_size, 256), shuffle=False, workers=config.workers)


def calibration_loader(config: TrainConfig, data: ImageData) -> DataLoader[Any]:
    """Batches of training images, without augmentation and always the same, for BN statistics."""
    loader = make_loader(data.calibration, config.batch_size, shuffle=True, workers=config.workers)
    start_epoch(loader, 0)
    return loader
