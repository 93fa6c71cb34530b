"""What a sandwich step costs against a plain step of the same network: time, memory and multiply-adds."""

from fastslim.bench.interleave import Ratio, Run, interleaved, quartiles, quickest, ratio_of
from fastslim.bench.machine import machine
from fastslim.bench.memory import peak_bytes, peak_of_training
from fastslim.bench.report import StepReport, measure_step
from fastslim.bench.sides import (
    FORMATS,
    Draws,
    Side,
    Task,
    call,
    each_tensor,
    in_faster_format,
    in_format,
    plain_side,
    sandwich_side,
    sgd,
)

__all__ = [
    "FORMATS",
    "Draws",
    "Ratio",
    "Run",
    "Side",
    "StepReport",
    "Task",
    "call",
    "each_tensor",
    "in_faster_format",
    "in_format",
    "interleaved",
    "machine",
    "measure_step",
    "peak_bytes",
    "peak_of_training",
    "plain_side",
    "quartiles",
    "quickest",
    "ratio_of",
    "sandwich_side",
    "sgd",
]
