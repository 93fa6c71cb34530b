"""What a search found, measured on the held-out data beside uniform widths, and its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastslim.algorithms import AutoSlim
from fastslim.cost import LatencyTable
from fastslim.data import ImageData
from fastslim.engine.config import TrainConfig
from fastslim.engine.evaluate import SubnetResult, aligned, evaluate_named, format_count
from fastslim.engine.run import calibration_loader, held_out_loader
from fastslim.engine.subnets import found_name
from fastslim.search import SearchReport
from fastslim.search.budgets import costs_of

Costs = dict[str, float]


@dataclass(frozen=True)
class FoundRow:
    """A subnet that was found, on the held-out data.

    Attributes:
        result: the subnet, with its calibrated accuracy.
        cost: that the budget limits.
        budget: as it was asked for.
        costs: all costs of the subnet.
        uniform: the uniform width whose cost is nearest.
        uniform_costs: all its costs.
    """

    result: SubnetResult
    cost: str
    budget: float
    costs: Costs
    uniform: SubnetResult
    uniform_costs: Costs


@dataclass(frozen=True)
class SearchOutcome:
    """How a call of `search_run` ended.

    Attributes:
        folder: of the search.
        status: ``"searched"``, or ``"finished before"`` (nothing was searched).
        scored_on: the images that subnets were compared on, in words.
        full: the full network on the held-out data.
        full_costs: all its costs.
        rows: what was found.
    """

    folder: Path
    status: Literal["searched", "finished before"]
    scored_on: str
    full: SubnetResult
    full_costs: Costs
    rows: list[FoundRow]


def all_costs(algo: AutoSlim, subnet: dict[str, int], latency: LatencyTable | None) -> Costs:
    """Counted costs by name, and the predicted latency where there is a table."""
    costs: Costs = dict(costs_of(algo.subnet_cost(subnet)))
    return costs if latency is None else {**costs, "latency": latency.predict(subnet)}


def evaluate_found(
    config: TrainConfig, data: ImageData, algo: AutoSlim, report: SearchReport, latency: LatencyTable | None
) -> tuple[SubnetResult, list[FoundRow]]:
    """The full network, what was found and the uniform widths beside it: calibrated, on the held-out data."""
    uniform = {
        found_name(found): nearest_uniform(algo, config.choices, found.cost, found.costs[found.cost], latency)
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
    rows = []
    for found in report.found:
        name, ratio = found_name(found), uniform[found_name(found)]
        beside = all_costs(algo, algo.uniform_subnet(ratio), latency)
        rows.append(
            FoundRow(by_name[name], found.cost, found.budget, dict(found.costs), by_name[f"width-{ratio:g}"], beside)
        )
    return by_name["full"], rows


def nearest_uniform(
    algo: AutoSlim, choices: Sequence[float], cost: str, value: float, latency: LatencyTable | None = None
) -> float:
    """The ratio, one of the choices, at which all units together cost about this much."""
    return min(
        sorted(set(choices)),
        key=lambda ratio: abs(all_costs(algo, algo.uniform_subnet(ratio), latency)[cost] - value),
    )


def outcome_of(folder: Path, results: dict[str, Any]) -> SearchOutcome:
    """What results.json of a finished search says."""
    measures = ("name", "multiply_adds", "parameters", "accuracy", "loss")
    rows = [
        FoundRow(
            SubnetResult(**{key: row[key] for key in measures}),
            row["cost"],
            row["budget"],
            row["costs"],
            SubnetResult(**{key: row["uniform"][key] for key in measures}),
            row["uniform"]["costs"],
        )
        for row in results["subnets"]
    ]
    full = SubnetResult(**{key: results["full"][key] for key in measures})
    return SearchOutcome(folder, "finished before", results["scored_on"], full, results["full"]["costs"], rows)


def row_as_dict(row: FoundRow) -> dict[str, Any]:
    """What results.json says of a found subnet."""
    uniform = {**row.uniform.as_dict(), "costs": row.uniform_costs}
    return {**row.result.as_dict(), "cost": row.cost, "budget": row.budget, "costs": row.costs, "uniform": uniform}


def format_outcome(outcome: SearchOutcome) -> str:
    """The table: what was found for each budget, and uniform widths at about the same cost."""

    def measures(row: SubnetResult) -> list[str]:
        return [format_count(row.multiply_adds), format_count(row.parameters)]

    def part(cost: str, costs: Costs) -> str:
        share = f"{100 * costs[cost] / max(outcome.full_costs[cost], 1e-12):.1f} %"
        return f"{share} of {cost}" if cost != "latency" else f"{costs[cost]:.3g} ms, {share}"

    def accuracy(row: SubnetResult) -> str:
        return f"{100 * row.accuracy:.2f} %"

    header = ["subnet", "multiply-adds", "parameters", "cost", "accuracy", "uniform width", "cost", "accuracy"]
    lines = [header, ["full", *measures(outcome.full), "", accuracy(outcome.full), "", "", ""]]
    for row in outcome.rows:
        found = [row.result.name, *measures(row.result), part(row.cost, row.costs), accuracy(row.result)]
        width = row.uniform.name.removeprefix("width-")
        lines.append([*found, width, part(row.cost, row.uniform_costs), accuracy(row.uniform)])
    return aligned(lines)
