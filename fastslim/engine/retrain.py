"""`retrain`: a subnet of a run, trained by itself as the plain network that it becomes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fastslim.algorithms import AutoSlim
from fastslim.data import ImageData
from fastslim.engine.build import build_supernet, load_all_data
from fastslim.engine.checkpoint import load_checkpoint
from fastslim.engine.config import TrainConfig
from fastslim.engine.evaluate import SubnetResult, accuracy_and_loss, evaluate_named
from fastslim.engine.options import differences
from fastslim.engine.run import calibration_loader, held_out_loader, load_run
from fastslim.engine.run_folder import RunFolder, check_entry, existing_run
from fastslim.engine.stage_folder import digest_of, origin
from fastslim.engine.stage_options import RetrainConfig, retrain_config
from fastslim.engine.subnet_trainer import SubnetTrainer
from fastslim.engine.subnets import ChosenSubnet, choose_subnet, found_subnets, subnet_key
from fastslim.errors import FastslimError, FastslimValueError, nearest
from fastslim.export import export_subnet, save_subnet
from fastslim.files import write_atomically


@dataclass(frozen=True)
class RetrainResult:
    """How a call of `retrain` ended.

    Attributes:
        folder: of the retraining.
        status: ``"trained"``, ``"finished before"`` (nothing was trained) or ``"stopped"`` (by a signal; resumable).
        epoch: complete epochs.
        full: the supernet's full width on the held-out data, the teacher of a distillation.
        before: the subnet with the supernet's weights and calibrated BN statistics (or those of its file), on the
            held-out data.
        after: the retrained network on the same; None after ``"stopped"``.
        saved: the network's folder, as `fastslim.export.load_subnet` reads it; None after ``"stopped"``.
    """

    folder: RunFolder
    status: Literal["trained", "finished before", "stopped"]
    epoch: int
    full: SubnetResult
    before: SubnetResult
    after: SubnetResult | None
    saved: Path | None


def retrain_options(run: Path | str, values: dict[str, Any], source: str = "the options") -> RetrainConfig:
    """The options of a run, overridden by some for the retraining.

    Args:
        run: the run's folder.
        values: such as ``{"subnet": "flops-0.5", "epochs": 20}``.
        source: where they come from, for messages.

    Raises:
        FastslimFileError: no run there.
        FastslimValueError: an unknown key, an impossible value, or one that only the supernet's training decides.
    """
    of_run = existing_run(run).saved_config()
    return retrain_config(of_run or TrainConfig(), values, source)


def default_name(run: Path, subnet: str) -> str:
    """The folder's name where none is given: the subnet's.

    Raises:
        FastslimValueError: no subnet is named.
    """
    if not subnet:
        found = found_subnets(run)
        hint = nearest("", found) if found else f"`fastslim search {run}` has found none yet, width-0.5 is always there"
        raise FastslimValueError(f"which subnet? give --subnet NAME; {hint}")
    path = Path(subnet)
    if path.suffix in (".json", ".yaml", ".yml"):  # nothing else: flops-0.5 has no ending
        return path.stem
    return path.parent.name if path.name == "subnet" else path.name


def retrain_folder(run: Path | str, name: str) -> RunFolder:
    """Where a retraining of a run lies."""
    return RunFolder(Path(run) / "retrain" / name, RetrainConfig, "--name")


def retrain(
    run: Path | str,
    config: RetrainConfig,
    *,
    name: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> RetrainResult:
    """Trains a subnet's plain network on all training images, those of the search too, and saves it.

    It begins with the supernet's weights (BN statistics calibrated), or from scratch: with the subnet's part of a
    freshly initialised network, scaled so that every layer's outputs vary as they would in the full one. With
    ``distill`` it learns the predictions of the supernet's full width, which are computed in the loop; with
    ``student_loss="ce+kd"`` the labels too.

    A retraining that is finished with the same options is not done again. On a CPU, one that is resumed ends bit for
    bit as if it had never stopped.

    Args:
        run: the run's folder.
        config: all options, see `retrain_options`.
        name: of the folder in ``RUN/retrain``; the subnet's by default.
        resume: go on with what is there; begin if there is nothing.
        overwrite: replace what is there.

    Raises:
        FastslimError: anything that cannot work, before time is spent on it; the message names the fix.
    """
    run, train_folder = Path(run), existing_run(run)
    folder = retrain_folder(run, name or default_name(run, config.subnet))
    if overwrite and resume:
        raise FastslimValueError("--resume goes on with a retraining, --overwrite starts it anew: choose one")
    made_of = {"supernet": digest_of(train_folder.last), "subnet": subnet_key(run, config.subnet)}
    if not overwrite:
        finished, saved = folder.finished_results(), folder.saved_config()
        if finished and saved and not differences(saved, config) and finished.get("made_of") == made_of:
            return finished_before(folder, config, finished)
        if finished and finished.get("made_of") != made_of:
            raise FastslimValueError(
                f"{folder.path} was trained from another supernet or subnet, which have changed since: "
                "choose another --name, or replace it with --overwrite"
            )
        check_entry(folder, config, resume and saved is not None)
    _, data, algo = load_run(run, device=config.device)
    subnet = choose_subnet(run, algo, config.subnet)
    full, before = evaluate_before(config, data, algo, subnet)
    teacher = exported(algo, algo.mutator.max_choices) if config.distill else None
    all_data = load_all_data(config)
    network = first_network(config, all_data, algo, subnet)
    folder.prepare()
    try:
        state = load_checkpoint(folder.last) if resume and folder.last.is_file() else None
        trainer = SubnetTrainer(
            config,
            all_data,
            network,
            folder,
            name=subnet.name,
            cost=algo.subnet_cost(subnet.choices),
            teacher=teacher,
            made_of=made_of,
        )
        torch.manual_seed(config.seed)
        if state:
            trainer.load(state)
        else:
            folder.clear()
            config.save(folder.config)
    except FastslimError:
        folder.remove_if_empty()
        raise
    if not trainer.fit():
        return RetrainResult(folder, "stopped", trainer.epoch, full, before, None, None)
    after = (trainer.results or trainer.evaluate())[0]
    saved_at = folder.path / "subnet"
    save_subnet(
        saved_at,
        algo.mutator,  # says what the units are; the weights are the network's
        subnet.choices,
        module=trainer.final_network().eval(),
        metrics={"accuracy": after.accuracy, "loss": after.loss},
        overwrite=True,
    )
    results = {
        "finished": True,
        "subnet": subnet.name,
        "choices": subnet.choices,
        "start": config.start,
        "distill": config.distill,
        "full": full.as_dict(),
        "before": before.as_dict(),
        "after": after.as_dict(),
        "training_seconds": round(trainer.seconds, 1),
        "made_of": made_of,
        **origin(),
        "config": config.as_dict(),
    }
    write_atomically(folder.results, json.dumps(results, indent=1) + "\n")
    return RetrainResult(folder, "trained", trainer.epoch, full, before, after, saved_at)


def finished_before(folder: RunFolder, config: RetrainConfig, results: dict[str, Any]) -> RetrainResult:
    """The results of an earlier retraining."""
    full, before, after = (SubnetResult(**results[key]) for key in ("full", "before", "after"))
    return RetrainResult(folder, "finished before", config.epochs, full, before, after, folder.path / "subnet")


def evaluate_before(config: RetrainConfig, data: ImageData, algo: AutoSlim, subnet: ChosenSubnet) -> list[SubnetResult]:
    """The full width, and the subnet before it is trained; afterwards both are calibrated."""
    loader = held_out_loader(config, data)
    full, before = evaluate_named(
        algo,
        loader,
        {"full": algo.mutator.max_choices, subnet.name: subnet.choices},
        calibration=calibration_loader(config, data),
        calibration_batches=config.calibration_batches or None,
    )
    if subnet.network is not None:
        accuracy, loss = accuracy_and_loss(subnet.network.eval(), loader)
        before = replace(before, accuracy=accuracy, loss=loss)
    return [full, before]


def exported(algo: AutoSlim, choices: dict[str, int]) -> nn.Module:
    """A plain network in evaluation mode."""
    return export_subnet(algo, choices).eval()


def first_network(config: RetrainConfig, data: ImageData, algo: AutoSlim, subnet: ChosenSubnet) -> nn.Module:
    """The network that training begins with, in training mode."""
    if config.start == "supernet":
        network = subnet.network if subnet.network is not None else exported(algo, subnet.choices)
        return network.train()
    fresh = build_supernet(config, data, next(algo.parameters()).device)
    full = export_subnet(fresh.mutator, fresh.mutator.max_choices)
    network = export_subnet(fresh.mutator, subnet.choices)
    scale_to_fewer_inputs(network, full)
    return network.train()


@torch.no_grad()
def scale_to_fewer_inputs(network: nn.Module, full: nn.Module) -> None:
    """Makes up for the inputs that a slice of freshly initialised weights lacks.

    The variance of a layer's outputs grows with the number of its inputs, so weights of n instead of N inputs are
    multiplied by sqrt(N / n), as initialisations by fan-in would have drawn them (He et al., arXiv:1502.01852).
    """
    sizes = {name: weight.shape for name, weight in full.named_parameters()}
    for name, weight in network.named_parameters():
        if weight.dim() > 1 and name in sizes:
            weight.mul_((sizes[name][1:].numel() / max(weight.shape[1:].numel(), 1)) ** 0.5)
