"""What costs, budgets, metrics and subnets are called in a report."""

from __future__ import annotations

import math

from fastslim.engine.evaluate import Evaluation, WidthResult
from fastslim.engine.export_run import format_bytes
from fastslim.engine.report_chart import count, percent
from fastslim.search.report import FoundSubnet

#: Costs that every evaluated subnet has, the first ones of a report.
COUNTED = ("flops", "parameters")
COSTS = {
    "flops": "multiply-adds",
    "parameters": "parameters",
    "memory": "activation memory",
    "latency": "latency",
}
#: On axes, where the unit is needed.
AXES = {
    "flops": "multiply-adds of one image",
    "parameters": "parameters",
    "memory": "activation memory of one image, bytes",
    "latency": "predicted latency, ms",
}
#: How metrics of fastslim's are called in words.
METRICS = {"minus_loss": "minus loss, nats"}


def name_of(cost: str) -> str:
    """A cost in words."""
    return COSTS.get(cost, cost)


def file_name(cost: str) -> str:
    """A cost as a part of a file's name."""
    return name_of(cost).replace("-", "_").replace(" ", "_")


def amount(cost: str, number: float) -> str:
    """A cost with three digits and its unit, where it has one."""
    if cost == "latency":
        return f"{number:.3g} ms"
    return format_bytes(round(number)) if cost == "memory" else count(number)


def budget(found: FoundSubnet) -> str:
    """A budget as short as can be: "≤ 50 %"."""
    return f"≤ {100 * found.budget:g} %" if found.budget <= 1 else f"≤ {amount(found.cost, found.budget)}"


def budget_of_cost(found: FoundSubnet) -> str:
    """A budget and its cost: "≤ 50 % of multiply-adds"."""
    of = " of" if found.budget <= 1 else ""
    return f"{budget(found)}{of} {name_of(found.cost)}"


def is_share(metric: str) -> bool:
    """Whether a metric is shown in per cent, as accuracies are."""
    return metric == "accuracy"


def score(metric: str, value: float) -> str:
    """A score as a table shows it."""
    return percent(value, 2) if is_share(metric) else f"{value:.4f}"


def title_of(row: Evaluation) -> str:
    """A uniform width or the name of a subnet."""
    return f"{row.width:.2f}×" if isinstance(row, WidthResult) else row.title


def ratio_of(name: str) -> str:
    """``width-0.5`` as the other tables say it."""
    try:
        return f"{float(name.removeprefix('width-')):.2f}×"
    except ValueError:
        return name


def counted(row: Evaluation) -> str:
    """The costs of an evaluated subnet."""
    return f"{count(row.multiply_adds)} multiply-adds, {count(row.parameters)} parameters"


def duration(seconds: float) -> str:
    """A time in words."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 90:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
