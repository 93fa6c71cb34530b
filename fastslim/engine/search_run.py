"""`search_run`: the best widths of a run's supernet for some budgets, scored on images that nothing is reported on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastslim.algorithms import AutoSlim
from fastslim.data import ImageData, make_loader
from fastslim.engine.build import load_all_data
from fastslim.engine.config import TrainConfig
from fastslim.engine.evaluate import SubnetResult, aligned, evaluate_named, format_count
from fastslim.engine.run import calibration_loader, held_out_loader, load_run
from fastslim.engine.run_folder import existing_run
from fastslim.engine.split import search_part
from fastslim.engine.stage_folder import StageFolder, digest_of
from fastslim.engine.stage_options import SearchOptions
from fastslim.engine.subnets import found_name
from fastslim.errors import FastslimValueError
from fastslim.search import SearchReport, evolution, greedy
from fastslim.search.budgets import check_reachable_budget, costs_of, parse_budgets

FILES = ("evaluated.jsonl", "state.json", "report.json")


@dataclass(frozen=True)
class FoundRow:
    """A subnet that was found, on the held-out data.

    Attributes:
        result: the subnet, with its calibrated accuracy.
        cost: that the budget limits.
        budget: as it was asked for.
        uniform: the uniform width whose cost is nearest.
    """

    result: SubnetResult
    cost: str
    budget: float
    uniform: SubnetResult


@dataclass(frozen=True)
class SearchOutcome:
    """How a call of `search_run` ended.

    Attributes:
        folder: of the search.
        status: ``"searched"``, or ``"finished before"`` (nothing was searched).
        scored_on: the images that subnets were compared on, in words.
        full: the full network on the held-out data.
        rows: what was found.
    """

    folder: Path
    status: Literal["searched", "finished before"]
    scored_on: str
    full: SubnetResult
    rows: list[FoundRow]


def search_folder(run: Path | str) -> StageFolder:
    """Where the search of a run lies."""
    return StageFolder(Path(run) / "search", "results.json", "search")


def search_run(
    run: Path | str,
    options: SearchOptions,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> SearchOutcome:
    """Searches all budgets and evaluates what was found on the held-out data; everything lies in the run's folder.

    A search that is finished with the same options is not done again. Ctrl-C and kills lose nothing: ``resume`` goes
    on to the result that it would have had.

    Args:
        run: the run's folder.
        options: all options.
        resume: go on with the search that is there; begin one if there is none.
        overwrite: replace the search that is there.
        progress: show a bar on a terminal, lines elsewhere.

    Raises:
        FastslimError: anything that cannot work, before time is spent on it; the message names the fix.
    """
    train_folder, folder = existing_run(run), search_folder(run)
    made_of = {"supernet": digest_of(train_folder.last)}
    results = folder.finished(options, made_of, resume=resume, overwrite=overwrite)
    if results is not None:
        return outcome_of(folder.path, results)
    config, data, algo = load_run(run, device=options.device)
    check_budgets(algo, options)
    images, scored_on = search_images(config, options)
    for name in FILES if overwrite else ():
        (folder.path / name).unlink(missing_ok=True)
    folder.begin(options, made_of)
    report = run_search(algo, options, images, calibration_loader(config, data), folder.path, progress)
    full, rows = evaluate_found(config, data, algo, report)
    folder.write(
        options,
        made_of,
        finished=True,
        scored_on=scored_on,
        full=full.as_dict(),
        subnets=[
            {
                **row.result.as_dict(),
                "cost": row.cost,
                "budget": row.budget,
                "score": found.score,
                "subnet": found.subnet,
                "uniform": row.uniform.as_dict(),
            }
            for row, found in zip(rows, report.found, strict=True)
        ],
    )
    return SearchOutcome(folder.path, "searched", scored_on, full, rows)


def check_budgets(algo: AutoSlim, options: SearchOptions) -> None:
    """Refuses an unknown cost, and a budget below the smallest subnet (it is named)."""
    full, smallest = (costs_of(algo.subnet_cost(c)) for c in (algo.mutator.max_choices, algo.mutator.min_choices))
    for name, values in parse_budgets(options.budget).items():
        for value in values:
            check_reachable_budget(name, value, smallest[name], full[name])


def search_images(config: TrainConfig, options: SearchOptions) -> tuple[Iterable[Any], str]:
    """Batches that subnets are compared on, and what they are in words.

    Raises:
        FastslimValueError: there are fewer images than are asked for.
    """
    part = search_part(load_all_data(config), config.search_share)
    length = len(part)  # type: ignore[arg-type]
    asked = length if options.images is None else options.images
    if asked > length:
        raise FastslimValueError(
            f"images={asked}: there are {length} to search on; ask for at most that, "
            "or train with a larger search_share"
        )
    if asked < length:
        # Not the first ones: those of a folder are all of one class.
        order = torch.randperm(length, generator=torch.Generator().manual_seed(0))[:asked]
        part = torch.utils.data.Subset(part, sorted(order.tolist()))
    loader = make_loader(part, options.batch_size, shuffle=False, workers=config.workers)
    seen = "left out of the training" if config.search_share else "of the training, seen by the supernet"
    batches = "" if options.batches is None else f", at most {options.batches} batches of {options.batch_size}"
    return loader, f"{asked} images {seen}{batches}"


def run_search(
    algo: AutoSlim,
    options: SearchOptions,
    images: Iterable[Any],
    calibration: Iterable[Any],
    folder: Path,
    progress: bool,
) -> SearchReport:
    """The search itself; it goes on with what the folder holds."""
    common: dict[str, Any] = {
        "calibration": calibration if options.calibrate else None,
        "calibration_batches": options.calibration_batches,
        "num_batches": options.batches,
        "metric": minus_loss if options.score == "loss" else None,
        "run": folder,
        "resume": True,
        "progress": progress,
        "seed": options.seed,
    }
    if options.method == "greedy":
        return greedy(algo, images, options.budget, **common)
    of_evolution = ("population_size", "generations", "top_k", "mutation_prob", "crossover_prob")
    return evolution(algo, images, options.budget, **{name: getattr(options, name) for name in of_evolution}, **common)


def minus_loss(output: Any, targets: Any) -> Tensor:
    """Minus the cross-entropy of each sample: it tells subnets apart that are right on the same images."""
    return -nn.functional.cross_entropy(output.float(), targets, reduction="none")


def evaluate_found(
    config: TrainConfig, data: ImageData, algo: AutoSlim, report: SearchReport
) -> tuple[SubnetResult, list[FoundRow]]:
    """What was found and the uniform widths beside it, calibrated, on the held-out data."""
    uniform = {
        found_name(found): nearest_uniform(algo, config.choices, found.cost, found.costs[found.cost])
        for found in report.found
    }
    subnets = {"full": algo.mutator.max_choices}
    subnets |= {found_name(found): dict(found.subnet) for found in report.found}
    subnets |= {f"width-{ratio:g}": algo.uniform_subnet(ratio) for ratio in uniform.values()}
    results = evaluate_named(
        algo,
        held_out_loader(config, data),
        subnets,
        calibration=calibration_loader(config, data),
        calibration_batches=config.calibration_batches or None,
    )
    by_name = {result.name: result for result in results}
    rows = [
        FoundRow(by_name[name], found.cost, found.budget, by_name[f"width-{uniform[name]:g}"])
        for name, found in ((found_name(found), found) for found in report.found)
    ]
    return by_name["full"], rows


def nearest_uniform(algo: AutoSlim, choices: Sequence[float], cost: str, value: float) -> float:
    """The ratio, one of the choices, at which all units together cost about this much."""
    return min(
        sorted(set(choices)),
        key=lambda ratio: abs(costs_of(algo.subnet_cost(algo.uniform_subnet(ratio)))[cost] - value),
    )


def outcome_of(folder: Path, results: dict[str, Any]) -> SearchOutcome:
    """What results.json of a finished search says."""
    rows = [
        FoundRow(
            SubnetResult(**{key: row[key] for key in ("name", "multiply_adds", "parameters", "accuracy", "loss")}),
            row["cost"],
            row["budget"],
            SubnetResult(**row["uniform"]),
        )
        for row in results["subnets"]
    ]
    return SearchOutcome(folder, "finished before", results["scored_on"], SubnetResult(**results["full"]), rows)


def format_outcome(outcome: SearchOutcome) -> str:
    """The table: what was found for each budget, and uniform widths at about the same cost."""

    def cells(row: SubnetResult) -> list[str]:
        share = f"{100 * row.multiply_adds / max(outcome.full.multiply_adds, 1):.1f} %"
        return [format_count(row.multiply_adds), share, format_count(row.parameters), f"{100 * row.accuracy:.2f} %"]

    header = ["subnet", "multiply-adds", "of full", "parameters", "accuracy", "uniform width", "of full", "accuracy"]
    lines = [header, ["full", *cells(outcome.full), "", "", ""]]
    for row in outcome.rows:
        _, share, _, accuracy = cells(row.uniform)
        lines.append([row.result.name, *cells(row.result), row.uniform.name.removeprefix("width-"), share, accuracy])
    return aligned(lines)


def as_dict(outcome: SearchOutcome) -> dict[str, Any]:
    """Plain values for JSON."""
    return {**asdict(outcome), "folder": str(outcome.folder)}
