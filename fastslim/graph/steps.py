"""What forward computes, step by step, as plain data."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastslim.graph.units import DimSpec


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the forward.

    Attributes:
        dims: parts of each dimension, as of the trace's units.
        dtype: its data type with the example inputs.
        stored: a parameter, a buffer or another tensor that was there before, and no activation.
        order: its dimensions from the one that is furthest apart in memory on, where that is not their own order.
    """

    dims: tuple[DimSpec, ...]
    dtype: torch.dtype
    stored: bool = False
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class NumberSpec:
    """A number that forward computes from a width: active entries of a dimension, divided by `divisor`."""

    dim: DimSpec
    divisor: int


@dataclass(frozen=True)
class Step:
    """One operation, as far as it can be told apart from outside: a call of a layer or of a torch function.

    Attributes:
        module: name of the module that is called; empty for a function.
        function: a function's name from its package on (``torch.nn.functional.relu``), a method's behind
            ``Tensor.``; empty for a module.
        args: positional arguments, with `TensorSpec` and `NumberSpec` in the place of tensors and widths.
        kwargs: keyword arguments, likewise.
        reads: activations it takes, as indices into `ForwardSteps.activations`.
        makes: activations it makes.
    """

    module: str
    function: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    reads: tuple[int, ...]
    makes: tuple[int, ...]


@dataclass(frozen=True)
class ForwardSteps:
    """A recorded forward in evaluation mode.

    Views (``flatten``, ``chunk``, ``permute``) are no steps: they are other names of the activation they look at. An
    operation that changes a whole activation in place counts as one that makes a new activation.

    Attributes:
        steps: in the order of the forward.
        activations: all tensors that are made, the inputs first.
        inputs: how many of them are inputs.
        outputs: those that forward returns.
        samples: samples in the example inputs: the first dimension of the first one.
        weights: name and bytes per entry of each parameter and buffer of the state_dict; shared ones once.
    """

    steps: tuple[Step, ...]
    activations: tuple[TensorSpec, ...]
    inputs: int
    outputs: tuple[int, ...]
    samples: int
    weights: tuple[tuple[str, int], ...]


def find_function(name: str) -> Callable[..., Any] | None:
    """The function or method that `Step.function` names, if it is there."""
    home, *path = name.split(".")
    found: Any = {"torch": torch, "Tensor": Tensor, "_operator": operator, "math": math}.get(home)
    for key in path:
        found = getattr(found, key, None)
    return found if callable(found) and path else None


def specs_in(value: Any) -> Iterator[TensorSpec]:
    """All tensors among the arguments of a step."""
    if isinstance(value, TensorSpec):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from specs_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from specs_in(item)
