"""The loss of a network's output against the targets, and losses as a framework hands them out made scalars."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fastslim import errors
from fastslim.ops import sandwich_loss


def task_losses(loss: Callable[[Any, Any], Any] | None, output: Any, targets: Any) -> dict[str, Tensor]:
    """Losses by name.

    Args:
        loss: ``loss(output, targets)`` -> scalar or dict of scalars; None, and any plain
            :class:`torch.nn.CrossEntropyLoss`, is the fused cross-entropy of logits ``(N, C, ...)``.
        output: the network's.
        targets: class indices ``(N, ...)`` or whatever `loss` takes.

    Raises:
        FastslimValueError: no targets.
        FastslimTypeError: cross-entropy of what is no tensor.
    """
    if targets is None:
        raise errors.FastslimValueError("the batch has no targets, and the max subnet learns from them")
    if loss is None:
        return {"loss": sandwich_loss(logits_of(output), [], targets)[0]}
    if type(loss) is nn.CrossEntropyLoss and loss.reduction == "mean":
        fused = sandwich_loss(
            logits_of(output),
            [],
            targets,
            label_smoothing=loss.label_smoothing,
            class_weight=loss.weight,
            ignore_index=loss.ignore_index,
        )
        return {"loss": fused[0]}
    losses = loss(output, targets)
    return as_scalars(losses) if isinstance(losses, Mapping) else {"loss": losses}


def as_scalars(losses: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every entry as one number: the mean of a tensor, the sum of the means of a list of tensors.

    Raises:
        FastslimTypeError: an entry that is neither.
    """
    scalars = {}
    for name, value in losses.items():
        parts = value if isinstance(value, (list, tuple)) and value else [value]
        if not all(isinstance(part, Tensor) for part in parts):
            raise errors.FastslimTypeError(
                f"losses are tensors or lists of tensors, but {name!r} is {type(value).__name__}: {value!r}"
            )
        scalars[name] = sum(map(_mean, parts[1:]), _mean(parts[0]))
    return scalars


def _mean(value: Tensor) -> Tensor:
    return value.mean() if value.dim() else value


def add_prefix(losses: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The same values as ``"<prefix>.<name>"``; an empty prefix changes nothing."""
    return {f"{prefix}.{name}" if prefix else name: value for name, value in losses.items()}


def logits_of(output: Any) -> Tensor:
    """The output, if it is a tensor.

    Raises:
        FastslimTypeError: it is not.
    """
    if not isinstance(output, Tensor):
        raise errors.FastslimTypeError(
            f"the network returns {type(output).__name__}, not a tensor of logits; pass `loss=` for the max subnet "
            "and a `distiller` with recorders for the others"
        )
    return output


def check_loss(loss: Any) -> Any:
    """`loss` itself, if it can be called or is None."""
    if loss is not None and not callable(loss):
        raise errors.FastslimTypeError(f"loss should be callable as loss(output, targets), but got {type(loss)}")
    return loss
