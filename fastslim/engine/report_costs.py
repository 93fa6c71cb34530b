"""Charts of accuracy against cost: of what was evaluated on held-out images, and of what a search saw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from fastslim.engine.evaluate import Evaluation
from fastslim.engine.report_chart import Axis, Chart, Point, Series, count_tick, percent
from fastslim.engine.report_parts import RunParts, SearchPart, pareto_front
from fastslim.engine.report_words import (
    AXES,
    COUNTED,
    METRICS,
    amount,
    budget,
    budget_of_cost,
    counted,
    file_name,
    is_share,
    name_of,
    score,
    title_of,
)

FOUND_MARKERS = ("diamond", "triangle")


def cost_axis(cost: str, values: Iterable[float]) -> Axis:
    """Costs from one to ten thousand million, by factors where they lie far apart."""
    given = list(values)
    far = bool(given) and 0 < 4 * min(given) < max(given)
    return Axis(f"{AXES.get(cost, cost)}{' (log scale)' if far else ''}", count_tick, log=far)


def percent_axis(what: str) -> Axis:
    """Accuracies of 0 to 100."""
    return Axis(f"{what}, %", limit=100.0)


def cost_of(row: Evaluation, cost: str) -> float:
    """A cost of an evaluated subnet."""
    return row.multiply_adds if cost == "flops" else row.parameters


def accuracy_chart(parts: RunParts, cost: str) -> Chart | None:
    """Held-out accuracy of uniform widths, found subnets and retrained ones; None where nothing was evaluated."""
    series = []
    if parts.widths:
        points = [_held_out(row, cost, title_of(row), "all units alike") for row in parts.widths]
        points.sort(key=lambda point: point.x)
        series.append(Series("uniform widths", tuple(points), "blue", "straight", "circle"))
    if parts.found:
        found = [_held_out(row.result, cost, row.result.name, "found, the supernet's weights") for row in parts.found]
        series.append(Series("found by the search", tuple(found), "orange", "none", "diamond"))
    if parts.retrained:
        named = {found.result.name for found in parts.found}  # a line leads to these from the label's point
        trained = [
            replace(
                _held_out(
                    part.after,
                    cost,
                    part.name,
                    f"trained alone {part.how}".strip(),
                    part.before.accuracy if part.before else None,
                ),
                label="" if part.name in named and part.before else part.name,
            )
            for part in parts.retrained
        ]
        series.append(Series("retrained alone", tuple(trained), "green", "none", "square"))
    measured = [point for one in series for point in one.points if point.drawable]
    front = [Point(x, y) for x, y in pareto_front([(point.x, point.y) for point in measured])]
    if len(series) > 1:
        series.insert(0, Series("Pareto front", tuple(front), "grey", "step"))
    if not parts.found:  # scores are of other images: beside the others, but not in their front
        scored = [search for search in parts.searches if search.report and is_share(search.report.metric)]
        series += [_found(search, cost, number) for number, search in enumerate(scored) if search.report.found]
    drawn = [point for one in series for point in one.points if point.drawable]
    if not drawn:
        return None
    detail = f"{parts.model} on {parts.data}, held-out images; statistics of batch norm calibrated for each subnet"
    if not parts.found and parts.searches:
        detail += "; found subnets by their score in the search"
    return Chart(
        f"accuracy_{file_name(cost)}",
        f"Accuracy against {name_of(cost)}",
        detail,
        cost_axis(cost, (point.x for point in drawn)),
        percent_axis("held-out accuracy"),
        tuple(series),
    )


def _held_out(row: Evaluation, cost: str, label: str, what: str, base: float | None = None) -> Point:
    gain = "" if base is None else f", {100 * base:.2f} % before"
    tip = f"{label}: {what}\n{percent(row.accuracy, 2)}{gain}\n{counted(row)}"
    return Point(cost_of(row, cost), 100 * row.accuracy, label, tip, None if base is None else 100 * base)


def _found(search: SearchPart, cost: str, marker: int = 0) -> Series:
    report = search.report
    assert report is not None
    scale = 100 if is_share(report.metric) else 1
    points = tuple(
        Point(
            found.costs[cost],
            scale * found.score,
            budget(found) if found.cost == cost else "",
            f"{budget_of_cost(found)}, {report.method} search\n{report.metric} {score(report.metric, found.score)}\n"
            ", ".join(f"{amount(name, value)} {name_of(name)}" for name, value in found.costs.items()),
        )
        for found in report.found
        if cost in found.costs
    )
    return Series(
        f"found, {report.method} search", points, ("orange", "purple")[marker % 2], "none",
        FOUND_MARKERS[marker % 2],  # type: ignore[arg-type]
    )  # fmt: skip


def search_costs(parts: RunParts) -> list[str]:
    """The costs to draw searches by: the counted ones, and others that a budget was given in."""
    asked = [found.cost for search in parts.searches if search.report for found in search.report.found]
    return list(dict.fromkeys((*COUNTED, *asked)))


def search_chart(parts: RunParts, cost: str) -> Chart | None:
    """Every subnet that searches have scored, their Pareto front and what they chose; None without a search."""
    searches = [search for search in parts.searches if search.evaluated]
    if not searches:
        return None
    metrics = [search.report.metric for search in searches if search.report]
    metric = metrics[0] if metrics else "score"
    alike = [search for search in searches if search.report is None or search.report.metric == metric]
    images = next((search.scored_on for search in alike if search.scored_on), None)
    scale = 100 if is_share(metric) else 1
    pairs = [(one.costs[cost], scale * one.score) for search in alike for one in search.evaluated if cost in one.costs]
    if not pairs:
        return None
    series = [
        Series(f"evaluated, {len(pairs)} subnets", tuple(Point(x, y) for x, y in pairs), "grey", "none", "dot"),
        Series("Pareto front", tuple(Point(x, y) for x, y in pareto_front(pairs)), "ink", "step"),
    ]
    finished = [search for search in alike if search.report and search.report.found]
    series += [_found(search, cost, number) for number, search in enumerate(finished)]
    return Chart(
        f"search_{file_name(cost)}",
        f"What the search saw, by {name_of(cost)}",
        f"Scores on the images that the search compares subnets on{f': {images}' if images else ''}",
        cost_axis(cost, (x for x, _ in pairs)),
        percent_axis("search accuracy")
        if is_share(metric)
        else Axis(METRICS.get(metric, f"{metric}, higher is better")),
        tuple(series),
    )


def best_row(rows: Sequence[Evaluation]) -> Evaluation | None:
    """The row with the best accuracy; of equal ones the cheapest."""
    known = [row for row in rows if math.isfinite(row.accuracy)]
    return min(known, key=lambda row: (-row.accuracy, row.multiply_adds), default=None)
