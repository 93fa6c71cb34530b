"""Budgets as a user writes them: ``{"flops": [0.5, 0.25], "parameters": 1_000_000}``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fastslim.errors import FastslimTypeError, FastslimValueError, nearest
from fastslim.graph import Cost

#: What a cost may be called, and the attribute of `fastslim.graph.Cost` that it is (latency is predicted instead).
COSTS = {
    "flops": "multiply_adds",
    "multiply_adds": "multiply_adds",
    "parameters": "parameters",
    "params": "parameters",
    "memory": "peak_activation_bytes",
    "latency": "latency",
}
CANONICAL = {
    "multiply_adds": "flops",
    "parameters": "parameters",
    "peak_activation_bytes": "memory",
    "latency": "latency",
}
Costs = dict[str, float]


class Latency(Protocol):
    """What a budget of latency needs, such as a `fastslim.cost.LatencyTable`."""

    def predict(self, subnet: Mapping[str, Any], /) -> float:
        """Milliseconds of a subnet."""


def cost_name(name: Any) -> str:
    """The name of a cost from any of its names.

    Returns:
        "flops" (multiply-adds of one sample), "parameters", "memory" (bytes of the activations that live at the same
        time, for one sample) or "latency" (ms).

    Raises:
        FastslimValueError: no cost is called so.
    """
    if name not in COSTS:
        raise FastslimValueError(f"no cost is called {name!r}; {nearest(str(name), COSTS)}")
    return CANONICAL[COSTS[name]]


def costs_of(cost: Cost) -> Costs:
    """All counted costs by name."""
    return {name: getattr(cost, attribute) for attribute, name in CANONICAL.items() if name != "latency"}


def parse_budgets(budgets: Any) -> dict[str, list[float]]:
    """Budgets by the canonical name of their cost.

    Raises:
        FastslimTypeError: not a dict of numbers.
        FastslimValueError: an unknown cost, no budget, or one that is not above 0.
    """
    if not isinstance(budgets, Mapping):
        raise FastslimTypeError(
            f'budgets should be a dict such as {{"flops": [0.5, 0.25]}}, but got {type(budgets).__name__}'
        )
    parsed: dict[str, list[float]] = {}
    for name, values in budgets.items():
        listed = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [values]
        known = parsed.setdefault(cost_name(name), [])
        known += [value for value in map(_check_budget, listed) if value not in known]
    if not any(parsed.values()):
        raise FastslimValueError('there is no budget; give for example budgets={"flops": [0.5, 0.25]}')
    return {name: values for name, values in parsed.items() if values}


def _check_budget(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FastslimTypeError(f"a budget should be a number, but got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise FastslimValueError(
            f"the budget {value!r} should be above 0: a fraction of the full cost up to 1, or an absolute cost"
        )
    return value


def check_reachable_budget(name: str, budget: float, smallest: float, full: float) -> None:
    """Refuses a budget below the smallest subnet.

    Raises:
        FastslimValueError: names the smallest cost, and its fraction of the full one.
    """
    if absolute(budget, full) < smallest:
        raise FastslimValueError(
            f"the budget {budget:.12g} of {name} is below the smallest subnet, which has {smallest:.12g} "
            f"({smallest / full:.4f} of the full network): ask for at least that, or give the units smaller choices"
        )


def absolute(budget: float, full: float) -> float:
    """A budget as a cost: up to 1 it is a fraction of the full one."""
    return budget * full if budget <= 1 else budget
