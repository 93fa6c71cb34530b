"""What makes a subnet good: accuracy by default, or a metric of the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastslim.errors import FastslimTypeError, FastslimValueError

Metric = Callable[[Any, Any], Any]
HOW_TO = (
    "pass metric=: a function metric(output, targets) that returns one score per sample (N,), or the mean of the "
    "batch; higher is better"
)


def accuracy(output: Any, targets: Any) -> Tensor:
    """Share of correct classes, per sample; NaN where the logits are.

    Args:
        output: logits (N, classes, ...).
        targets: class indices (N, ...).

    Raises:
        FastslimTypeError: the output is no tensor, or the targets are no class indices.
        FastslimValueError: their shapes do not belong together.
    """
    if not isinstance(output, Tensor):
        raise FastslimTypeError(f"the network returns {type(output).__name__}, not a tensor of logits; {HOW_TO}")
    if not isinstance(targets, Tensor) or targets.dtype.is_floating_point or targets.dtype == torch.bool:
        kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise FastslimTypeError(f"accuracy needs class indices as targets, but they are {kind}; {HOW_TO}")
    if output.dim() < 2 or targets.shape != output.shape[:1] + output.shape[2:]:
        raise FastslimValueError(
            f"an output of shape {tuple(output.shape)} is no set of logits (N, classes) for targets of shape "
            f"{tuple(targets.shape)}; {HOW_TO}"
        )
    correct = (output.argmax(1) == targets).float()
    # argmax of NaN is some class: a broken subnet would look like a poor one.
    correct = correct.masked_fill(output.isnan().any(1), torch.nan)
    return correct.flatten(1).mean(1) if correct.dim() > 1 else correct


def batch_total(metric: Metric, output: Any, targets: Any, samples: int) -> Tensor:
    """The sum of a metric over the samples of a batch, a scalar that stays on its device.

    Raises:
        FastslimTypeError: the metric returns no number.
        FastslimValueError: it returns neither one score nor one per sample.
    """
    scores = metric(output, targets)
    if isinstance(scores, (int, float)):
        scores = torch.tensor(float(scores))
    if not isinstance(scores, Tensor):
        raise FastslimTypeError(f"the metric returns {type(scores).__name__}; {HOW_TO}")
    if scores.dim() == 0:
        return scores.double() * samples if scores.device.type != "mps" else scores * samples
    if tuple(scores.shape) != (samples,):
        raise FastslimValueError(
            f"the metric returns scores of shape {tuple(scores.shape)} for a batch of {samples} samples; {HOW_TO}"
        )
    return scores.sum(dtype=None if scores.device.type == "mps" else torch.float64)
