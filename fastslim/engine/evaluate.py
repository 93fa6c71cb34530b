"""Accuracy and cost of subnets, with BN statistics calibrated for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fastslim.algorithms import AutoSlim
from fastslim.algorithms.calibrate import calibrate_batch_norm
from fastslim.errors import FastslimValueError


@dataclass(frozen=True)
class WidthResult:
    """One evaluated subnet.

    Attributes:
        width: ratio of the supernet's channels that every unit keeps.
        multiply_adds: of one image.
        parameters: weights and biases of the subnet.
        accuracy: share of held-out images classified correctly, 0 to 1.
        loss: mean cross-entropy on them.
    """

    width: float
    multiply_adds: int
    parameters: int
    accuracy: float
    loss: float

    def as_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return asdict(self)


def spaced_widths(choices: Sequence[float], count: int) -> list[float]:
    """``count`` of the choices, evenly spaced from the narrowest to the full width (all, if there are fewer)."""
    narrow_to_full = sorted(set(choices))
    count = min(count, len(narrow_to_full))
    if count < 2:
        return narrow_to_full[-count:]
    targets = [narrow_to_full[0] + (1 - narrow_to_full[0]) * i / (count - 1) for i in range(count)]
    return sorted({min(narrow_to_full, key=lambda ratio: abs(ratio - target)) for target in targets})


def evaluate_widths(
    algo: AutoSlim,
    loader: Iterable[Any],
    widths: Sequence[float],
    *,
    calibration: Iterable[Any] | None,
    calibration_batches: int | None = None,
) -> list[WidthResult]:
    """Evaluates uniform subnets; afterwards the algorithm runs at full width, in the mode it was in.

    Args:
        algo: the supernet.
        loader: held-out ``(images, labels)``.
        widths: ratios, each applied to every channel unit.
        calibration: training batches that BN statistics are computed from; None evaluates with those of the
            training, which are a mixture of all widths and break the narrow ones.
        calibration_batches: how many of them; None: all.

    Returns:
        One result a width, in the given order.

    Raises:
        FastslimValueError: nothing to evaluate on.
    """
    was_training = algo.training
    subnets = [algo.uniform_subnet(width) for width in widths]
    try:
        if calibration is None:
            algo.drop_calibration()
        else:
            calibrate_batch_norm(algo, calibration, subnets, num_batches=calibration_batches)
        return [evaluate_subnet(algo, loader, subnet, width) for width, subnet in zip(widths, subnets, strict=True)]
    finally:
        algo.set_max_subnet()
        algo.train(was_training)


@torch.no_grad()
def evaluate_subnet(algo: AutoSlim, loader: Iterable[Any], subnet: Mapping[str, int], width: float) -> WidthResult:
    """Accuracy, loss and cost of one subnet in evaluation mode."""
    algo.eval()
    algo.set_subnet(subnet)
    device = next(algo.parameters()).device
    correct, loss, count = 0.0, 0.0, 0
    for images, labels in loader:
        labels = labels.to(device)
        logits = algo(images.to(device)).float()
        correct += (logits.argmax(1) == labels).sum().item()
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += len(labels)
    if count == 0:
        raise FastslimValueError("the held-out data is empty: there is nothing to evaluate on")
    cost = algo.subnet_cost(subnet)
    return WidthResult(width, cost.multiply_adds, cost.parameters, correct / count, loss / count)


def format_table(results: Sequence[WidthResult]) -> str:
    """The results as aligned text, widest first."""
    header = ("width", "multiply-adds", "of full", "parameters", "accuracy")
    rows = sorted(results, key=lambda result: -result.width)
    full = max(rows[0].multiply_adds, 1)
    cells = [
        (
            f"{row.width:.2f}x",
            format_count(row.multiply_adds),
            f"{100 * row.multiply_adds / full:.1f} %",
            format_count(row.parameters),
            f"{100 * row.accuracy:.2f} %",
        )
        for row in rows
    ]
    sizes = [max(len(line[i]) for line in (header, *cells)) for i in range(len(header))]
    lines = ["   ".join(cell.rjust(size) for cell, size in zip(line, sizes, strict=True)) for line in (header, *cells)]
    rule = "   ".join("-" * size for size in sizes)
    return "\n".join([lines[0], rule, *lines[1:]])


def format_count(number: float) -> str:
    """Three significant digits and a unit: 1 234 567 is 1.23 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            scaled = number / size
            return f"{scaled:.{3 - len(str(int(scaled)))}f} {unit}"
    return f"{number:.0f}"
