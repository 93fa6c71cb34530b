"""Trace a model to its channel units, count what a subnet costs, and plan the training step."""

from fastslim.graph.cost import Cost, count_cost
from fastslim.graph.plan import ExecutionPlan, make_plan
from fastslim.graph.trace import Report, Trace, trace
from fastslim.graph.units import LayerSpec, Segments, UnitSpec

__all__ = [
    "Cost",
    "ExecutionPlan",
    "LayerSpec",
    "Report",
    "Segments",
    "Trace",
    "UnitSpec",
    "count_cost",
    "make_plan",
    "trace",
]
