"""Accuracy and cost of subnets, with BN statistics calibrated for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

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

    @property
    def title(self) -> str:
        """How tables and progress call it."""
        return f"{self.width:.2f}x"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class SubnetResult:
    """One evaluated subnet that has a name.

    Attributes:
        name: such as "flops-0.5", as the search calls what it found.
        multiply_adds: of one image.
        parameters: weights and biases of the subnet.
        accuracy: share of held-out images classified correctly, 0 to 1.
        loss: mean cross-entropy on them.
    """

    name: str
    multiply_adds: int
    parameters: int
    accuracy: float
    loss: float

    @property
    def title(self) -> str:
        """How tables and progress call it."""
        return self.name

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Evaluation(Protocol):
    """What both kinds of results have."""

    @property
    def title(self) -> str:
        """How tables and progress call it."""

    @property
    def multiply_adds(self) -> int:
        """Of one image."""

    @property
    def parameters(self) -> int:
        """Weights and biases."""

    @property
    def accuracy(self) -> float:
        """Share of held-out images classified correctly, 0 to 1."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""


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


def evaluate_subnet(algo: AutoSlim, loader: Iterable[Any], subnet: Mapping[str, int], width: float) -> WidthResult:
    """Accuracy, loss and cost of one subnet in evaluation mode."""
    algo.eval()
    algo.set_subnet(subnet)
    accuracy, loss = accuracy_and_loss(algo, loader)
    cost = algo.subnet_cost(subnet)
    return WidthResult(width, cost.multiply_adds, cost.parameters, accuracy, loss)


def evaluate_named(
    algo: AutoSlim,
    loader: Iterable[Any],
    subnets: Mapping[str, Mapping[str, int]],
    *,
    calibration: Iterable[Any] | None,
    calibration_batches: int | None = None,
) -> list[SubnetResult]:
    """Evaluates subnets as `evaluate_widths` does uniform ones.

    Args:
        algo: the supernet.
        loader: held-out ``(images, labels)``.
        subnets: by name.
        calibration: see `evaluate_widths`.
        calibration_batches: see `evaluate_widths`.

    Raises:
        FastslimValueError: nothing to evaluate on.
    """
    was_training = algo.training
    try:
        if calibration is None:
            algo.drop_calibration()
        elif subnets:
            calibrate_batch_norm(algo, calibration, list(subnets.values()), num_batches=calibration_batches)
        found = [evaluate_subnet(algo, loader, subnet, 1.0) for subnet in subnets.values()]
    finally:
        algo.set_max_subnet()
        algo.train(was_training)
    return [
        SubnetResult(name, row.multiply_adds, row.parameters, row.accuracy, row.loss)
        for name, row in zip(subnets, found, strict=True)
    ]


@torch.no_grad()
def accuracy_and_loss(network: nn.Module, loader: Iterable[Any]) -> tuple[float, float]:
    """Share of images classified correctly, and mean cross-entropy; the network is in evaluation mode already.

    Raises:
        FastslimValueError: the loader is empty.
    """
    device = next(network.parameters()).device
    correct, loss, count = 0.0, 0.0, 0
    for images, labels in loader:
        labels = labels.to(device)
        logits = network(images.to(device)).float()
        correct += (logits.argmax(1) == labels).sum().item()
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += len(labels)
    if count == 0:
        raise FastslimValueError("the held-out data is empty: there is nothing to evaluate on")
    return correct / count, loss / count


def format_table(results: Sequence[WidthResult]) -> str:
    """Uniform widths as aligned text, widest first."""
    rows = sorted(results, key=lambda result: -result.width)
    return format_evaluations(rows, "width", rows[0].multiply_adds)


def format_evaluations(rows: Sequence[Evaluation], header: str, full: int) -> str:
    """Results as aligned text.

    Args:
        rows: in the order of the lines.
        header: of the first column.
        full: multiply-adds of the full network.
    """
    cells = [
        (
            row.title,
            format_count(row.multiply_adds),
            f"{100 * row.multiply_adds / max(full, 1):.1f} %",
            format_count(row.parameters),
            f"{100 * row.accuracy:.2f} %",
        )
        for row in rows
    ]
    return aligned([(header, "multiply-adds", "of full", "parameters", "accuracy"), *cells])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, a rule below the first line."""
    sizes = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    texts = ["   ".join(cell.rjust(size) for cell, size in zip(line, sizes, strict=True)).rstrip() for line in lines]
    return "\n".join([texts[0], "   ".join("-" * size for size in sizes), *texts[1:]])


def format_count(number: float) -> str:
    """Three significant digits and a unit: 1 234 567 is 1.23 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            scaled = number / size
            return f"{scaled:.{max(3 - len(str(int(scaled))), 0)}f} {unit}"
    return f"{number:.0f}"
