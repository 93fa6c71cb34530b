"""What a subnet costs: counted (multiply-adds, parameters, memory), and timed on the machine it shall run on."""

from fastslim.cost.latency import LatencyTable
from fastslim.cost.latency_report import LatencyReport, LatencyRow
from fastslim.cost.source import cost_of
from fastslim.cost.stopwatch import Stopwatch
from fastslim.graph import Cost

__all__ = ["Cost", "LatencyReport", "LatencyRow", "LatencyTable", "Stopwatch", "cost_of"]
