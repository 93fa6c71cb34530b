"""Trace a model to its channel units, count what a subnet costs, and plan the training step."""

from fastslim.graph.cost import Cost, count_cost
from fastslim.graph.plan import ExecutionPlan, make_plan
from fastslim.graph.report import Finding, LayerRow, Report, make_report
from fastslim.graph.stem import Stem
from fastslim.graph.trace import Trace, trace
from fastslim.graph.units import LayerSpec, Segments, UnitSpec

__all__ = [
    "Cost",
    "ExecutionPlan",
    "Finding",
    "LayerRow",
    "LayerSpec",
    "Report",
    "Segments",
    "Stem",
    "Trace",
    "UnitSpec",
    "count_cost",
    "make_plan",
    "make_report",
    "trace",
]
