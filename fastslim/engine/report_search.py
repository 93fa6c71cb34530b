"""The section about searches: what they evaluated, what they chose, and the widths of every unit."""

from __future__ import annotations

import math

from fastslim.engine.evaluate import SubnetResult
from fastslim.engine.report_chart import percent
from fastslim.engine.report_costs import search_chart, search_costs
from fastslim.engine.report_markup import Markup
from fastslim.engine.report_page import Cell, Section, figure, missing, pair, table
from fastslim.engine.report_parts import RunParts
from fastslim.engine.report_widths import Column, widths_figure
from fastslim.engine.report_words import METRICS, amount, budget_of_cost, name_of, ratio_of, score
from fastslim.engine.subnets import found_name
from fastslim.search.report import EvaluatedSubnet, FoundSubnet


def search_section(parts: RunParts) -> Section:
    """What searches evaluated and chose, and the widths of every unit."""
    if not parts.searches:
        line = missing("No search yet:", parts.command("search", "--budget flops=0.5,0.25"))
        return Section("search", "Search", (line,))
    charts = [chart for cost in search_costs(parts) if (chart := search_chart(parts, cost))]
    body = [pair(*map(figure, charts))] if charts else []
    for search in parts.searches:
        if search.report is None:
            text = f"The search in {search.folder} is not finished, {len(search.evaluated)} subnets are evaluated:"
            body.append(missing(text, parts.command("search", "--resume")))
    finished = [search.report for search in parts.searches if search.report]
    if finished:
        body.append(_found_table(parts))
        full, columns = width_columns(parts)
        if columns:
            body.append(widths_figure(full, columns))
    return Section("search", "Search", tuple(body))


def _found_table(parts: RunParts) -> Markup:
    """Each budget's subnet: its costs, its score, and beside its held-out accuracy that of a uniform width."""
    finished = [(search.report, search.found) for search in parts.searches if search.report]
    costs = search_costs(parts)
    head = [Cell("name"), Cell("budget", words=True), *(Cell(f"{name_of(cost)}, of full") for cost in costs)]
    head += [Cell("score"), Cell("held-out accuracy"), Cell("uniform width")]
    rows = []
    for report, measured in finished:
        held_out = {found.result.name: found for found in measured}
        full = report.full
        listed: list[tuple[str, str, EvaluatedSubnet | FoundSubnet]] = [("full", "the full network", full)]
        listed += [(found_name(found), budget_of_cost(found), found) for found in report.found]
        for name, budget, subnet in listed:
            known = held_out.get(name)
            uniform = known.uniform if known else None
            cells = [Cell(name), Cell(budget if len(finished) == 1 else f"{budget}, {report.method}", words=True)]
            for cost in costs:
                value, whole = subnet.costs.get(cost, math.nan), full.costs.get(cost, math.nan)
                share = percent(value / whole) if whole else "–"
                cells.append(Cell(f"{amount(cost, value)}, {share}" if math.isfinite(value) else "–", value))
            cells.append(Cell(score(report.metric, subnet.score), subnet.score))
            cells.append(_accuracy(known.result if known else None))
            cells.append(_accuracy(uniform, f"{ratio_of(uniform.name)}: " if uniform else ""))
            rows.append(cells)
    names = sorted({METRICS.get(report.metric, report.metric) for report, _ in finished})
    shown = ", ".join(names)
    detail = (
        f"The best one within each budget; score: {shown}, as the search measured it; uniform width: of about that cost"
    )
    return table("Found subnets", detail, head, rows)


def _accuracy(row: SubnetResult | None, before: str = "") -> Cell:
    return Cell(f"{before}{percent(row.accuracy, 2)}", row.accuracy) if row else Cell("–", math.nan)


def width_columns(parts: RunParts) -> tuple[dict[str, int], list[Column]]:
    """All channels by unit, and the found subnets of the searches that share those units."""
    finished = [search.report for search in parts.searches if search.report and search.report.found]
    if not finished:
        return {}, []
    full = finished[0].full.subnet
    columns = [
        Column(
            found_name(found),
            f"{report.method}, {amount('flops', found.costs['flops'])}, {score(report.metric, found.score)}",
            found.subnet,
            number,
        )
        for number, report in enumerate(finished)
        if report.full.subnet.keys() == full.keys()
        for found in report.found
    ]
    return full, columns
