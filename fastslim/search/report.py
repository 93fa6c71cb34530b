"""What a search found: the best subnet of every budget, and everything that was evaluated."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastslim.errors import FastslimFileError, FastslimValueError
from fastslim.files import write_atomically
from fastslim.search.budgets import Costs, absolute, cost_name
from fastslim.search.candidates import Choices

FORMAT = "fastslim-search-report-1"
TITLES = {
    "flops": "multiply-adds",
    "parameters": "parameters",
    "memory": "bytes of activations",
    "latency": "latency",
}


@dataclass(frozen=True)
class EvaluatedSubnet:
    """A subnet with its costs ("flops", "parameters", "memory", "latency" if it was predicted) and its score."""

    subnet: Choices
    costs: Costs
    score: float


@dataclass(frozen=True)
class FoundSubnet:
    """The subnet found for a budget.

    Attributes:
        cost: name of the cost that the budget limits.
        budget: as it was asked for.
        limit: the budget as an absolute cost.
        subnet: the width of every mutable unit.
        costs: all its costs.
        score: its score.
    """

    cost: str
    budget: float
    limit: float
    subnet: Choices
    costs: Costs
    score: float


@dataclass(frozen=True)
class SearchReport:
    """The result of a search; prints as a table.

    Attributes:
        method: "greedy" or "evolution".
        metric: name of what was maximised.
        full: the full network.
        found: one subnet for every budget, grouped by cost, from the largest budget to the smallest.
        evaluated: every subnet that was evaluated, in order; each once.
    """

    method: str
    metric: str
    full: EvaluatedSubnet
    found: tuple[FoundSubnet, ...]
    evaluated: tuple[EvaluatedSubnet, ...]

    def best(self, cost: str, budget: float) -> Choices:
        """The subnet found for a budget, as `fastslim.export_subnet` takes it.

        Args:
            cost: "flops", "parameters", "memory" or "latency".
            budget: one that was searched for, as a fraction or as an absolute cost.

        Raises:
            FastslimValueError: it was not searched for; names those that were.
        """
        return dict(self._found(cost, budget).subnet)

    def _found(self, cost: str, budget: float) -> FoundSubnet:
        name = cost_name(cost)
        of_cost = [found for found in self.found if found.cost == name]
        limit = absolute(budget, self.full.costs[name])
        for found in of_cost:
            if math.isclose(found.limit, limit, rel_tol=1e-9):
                return found
        searched = ", ".join(f"{found.cost} {found.budget:g}" for found in of_cost or self.found)
        raise FastslimValueError(
            f"no subnet was searched for a budget of {budget:g} of {name}; there are: {searched}. "
            f"report.front({name!r}) lists all evaluated subnets worth having"
        )

    def front(self, cost: str) -> list[EvaluatedSubnet]:
        """The evaluated subnets that no other one beats in both cost and score, from cheap to good.

        Raises:
            FastslimValueError: no cost is called so.
        """
        name = cost_name(cost)
        front: list[EvaluatedSubnet] = []
        for candidate in sorted(self.evaluated, key=lambda one: (one.costs[name], -one.score)):
            if not front or candidate.score > front[-1].score:
                front.append(candidate)
        return front

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: Path | str) -> None:
        """Writes the report as JSON; whatever interrupts it, the file is the old or the new one.

        Raises:
            FastslimFileError: the folder or the disk refuses.
        """
        write_atomically(Path(path), json.dumps(self.as_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> SearchReport:
        """Reads what `save` wrote.

        Raises:
            FastslimFileError: the file is missing, damaged or no report of a search.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise FastslimFileError(f"{path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise FastslimFileError(f"{path} is no search report: it is not JSON ({error})") from error
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise FastslimFileError(f"{path} is no search report: SearchReport.save writes files with format {FORMAT}")
        try:
            return cls(
                data["method"],
                data["metric"],
                EvaluatedSubnet(**data["full"]),
                tuple(FoundSubnet(**found) for found in data["found"]),
                tuple(EvaluatedSubnet(**evaluated) for evaluated in data["evaluated"]),
            )
        except (KeyError, TypeError) as error:
            raise FastslimFileError(f"{path} is a damaged search report ({error}): search again") from error

    def __str__(self) -> str:
        shown = ["flops", "parameters", *dict.fromkeys(f.cost for f in self.found if f.cost in ("memory", "latency"))]
        titles = [title for cost in shown for title in (TITLES[cost], "of full")]
        rows: list[tuple[str, ...]] = [("budget", *titles, self.metric)]
        rows.append(self._row("full network", shown, self.full))
        for found in self.found:
            asked = f"{100 * found.budget:g} %" if found.budget <= 1 else _number(found.cost, found.budget)
            rows.append(self._row(f"{found.cost} {asked}", shown, found))
        sizes = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "   ".join([row[0].ljust(sizes[0]), *(c.rjust(s) for c, s in zip(row[1:], sizes[1:], strict=True))])
            for row in rows
        ]
        lines.insert(1, "   ".join("-" * size for size in sizes))
        return "\n".join([f"{self.method} search, {len(self.evaluated)} subnets evaluated", *lines])

    def _row(self, name: str, shown: Sequence[str], one: EvaluatedSubnet | FoundSubnet) -> tuple[str, ...]:
        cells = [name]
        for cost in shown:
            share = 100 * one.costs[cost] / max(self.full.costs[cost], 1e-12)
            cells += [_number(cost, one.costs[cost]), f"{share:.1f} %"]
        return (*cells, f"{one.score:.4f}")


def _number(cost: str, number: float) -> str:
    return f"{number:.3g} ms" if cost == "latency" else _count(number)


def _count(number: float) -> str:
    """Three significant digits and a unit: 1 234 567 is 1.23 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            scaled = number / size
            return f"{scaled:.{max(3 - len(str(int(scaled))), 0)}f} {unit}"
    return f"{number:.0f}"
