"""`search_run`: the best widths of a run's supernet for some budgets, scored on images that nothing is reported on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastslim.algorithms import AutoSlim
from fastslim.cost import LatencyTable
from fastslim.data import make_loader
from fastslim.engine.build import load_all_data
from fastslim.engine.config import TrainConfig
from fastslim.engine.run import calibration_loader, load_run
from fastslim.engine.run_folder import existing_run
from fastslim.engine.search_outcome import SearchOutcome, all_costs, evaluate_found, outcome_of, row_as_dict
from fastslim.engine.split import search_part
from fastslim.engine.stage_folder import StageFolder, digest_of
from fastslim.engine.stage_options import SearchOptions
from fastslim.errors import FastslimRuntimeError, FastslimValueError
from fastslim.files import write_atomically
from fastslim.search import SearchReport, evolution, greedy
from fastslim.search.budgets import check_reachable_budget, costs_of, parse_budgets

FILES = ("evaluated.jsonl", "state.json", "report.json")


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
    latency = latency_table(Path(run), algo, options, progress)
    images, scored_on = search_images(config, options)
    for name in FILES if overwrite else ():
        (folder.path / name).unlink(missing_ok=True)
    folder.begin(options, made_of)
    report = run_search(algo, options, images, calibration_loader(config, data), latency, folder.path, progress)
    full, rows = evaluate_found(config, data, algo, report, latency)
    full_costs = all_costs(algo, algo.mutator.max_choices, latency)
    folder.write(
        options,
        made_of,
        finished=True,
        scored_on=scored_on,
        full={**full.as_dict(), "costs": full_costs},
        subnets=[
            {**row_as_dict(row), "score": found.score, "subnet": found.subnet}
            for row, found in zip(rows, report.found, strict=True)
        ],
    )
    if latency is not None:  # how far off the predictions are, for the report
        checked = dataclasses.asdict(latency.check())
        write_atomically(Path(run) / "latency.json", json.dumps(checked, indent=1) + "\n")
    return SearchOutcome(folder.path, "searched", scored_on, full, full_costs, rows)


def check_budgets(algo: AutoSlim, options: SearchOptions) -> None:
    """Refuses an unknown cost, and a budget below the smallest subnet (it is named)."""
    full, smallest = (costs_of(algo.subnet_cost(c)) for c in (algo.mutator.max_choices, algo.mutator.min_choices))
    for name, values in parse_budgets(options.budget).items():
        for value in values if name != "latency" else ():  # it is not measured yet
            check_reachable_budget(name, value, smallest[name], full[name])


def latency_table(run: Path, algo: AutoSlim, options: SearchOptions, progress: bool) -> LatencyTable | None:
    """The predicted times of subnets, where a budget needs them; measured once and kept in the run's folder.

    What was measured is not measured on: a search that goes on needs the predictions that it began with.

    Raises:
        FastslimValueError: no such device here, or a budget below the fastest subnet.
        FastslimRuntimeError: the time was too short.
    """
    budgets = parse_budgets(options.budget).get("latency")
    if not budgets:
        return None
    table = LatencyTable(algo, device=options.latency_device, batch_size=options.latency_batch_size, cache=run)
    if not table.level:
        table.measure(options.latency_seconds, progress=progress)
    if not table.level:
        raise FastslimRuntimeError(
            f"{options.latency_seconds:g} s were too short to time every operation; what was timed is kept: "
            "run it again, or with a larger --latency-seconds"
        )
    smallest, full = (table.predict(choices) for choices in (algo.mutator.min_choices, algo.mutator.max_choices))
    for value in budgets:
        check_reachable_budget("latency", value, smallest, full)
    return table


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
    latency: LatencyTable | None,
    folder: Path,
    progress: bool,
) -> SearchReport:
    """The search itself; it goes on with what the folder holds."""
    common: dict[str, Any] = {
        "calibration": calibration if options.calibrate else None,
        "calibration_batches": options.calibration_batches,
        "num_batches": options.batches,
        "metric": minus_loss if options.score == "loss" else None,
        "latency": latency,
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
