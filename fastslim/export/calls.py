"""What a network is called with: its arguments, batches of another size of them, and their description."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastslim.errors import FastslimValueError
from fastslim.graph.capture import bind_inputs


class Call(NamedTuple):
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @torch.no_grad()
    def of(self, module: nn.Module) -> Any:
        """The module's output."""
        return module(*self.args, **self.kwargs)

    def cast(self, dtype: torch.dtype) -> Call:
        """The same with all float tensors in this dtype."""

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return Call(*pytree.tree_map(cast, (self.args, self.kwargs)))


def call_with(module: nn.Module, inputs: Any) -> Call:
    """A call of a module, on its device and in its float dtype.

    Args:
        module: what is called.
        inputs: a tensor, a tuple of arguments, a dict of keyword arguments or a shape such as ``(1, 3, 224, 224)``.

    Raises:
        FastslimTypeError: they do not fit forward.
    """
    bound = inspect.BoundArguments(inspect.signature(module.forward), OrderedDict(bind_inputs(module, inputs)))
    return Call(bound.args, bound.kwargs)


def informative(call: Call) -> Call:
    """The call with noise for float tensors that are the same everywhere, as the zeros made from a shape are."""
    generator = torch.Generator().manual_seed(0)

    def noise(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() < 2:
            return value
        if not bool((value == value.flatten()[0]).all()):
            return value
        return torch.randn(value.shape, generator=generator).to(value)

    return Call(*pytree.tree_map(noise, (call.args, call.kwargs)))


def has_batch(value: Any, size: int) -> bool:
    """Whether a value is a tensor whose first dimension is the batch."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size


def batch_size(call: Call) -> int:
    """Samples in the first tensor.

    Raises:
        FastslimValueError: there is none.
    """
    for value in pytree.tree_leaves((call.args, call.kwargs)):
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] > 0:
            return int(value.shape[0])
    raise FastslimValueError("the example inputs hold no tensor with a batch; give at least one sample")


def with_batch(call: Call, size: int) -> Call:
    """The same samples over and over, or the first ones, in a batch of another size."""
    present = batch_size(call)

    def resized(value: Any) -> Any:
        return value[torch.arange(size, device=value.device) % present] if has_batch(value, present) else value

    return Call(*pytree.tree_map(resized, (call.args, call.kwargs)))


def describe(value: Any) -> dict[str, Any]:
    """Shape and dtype of tensors and the values of constants, as plain values for JSON."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).rpartition(".")[2]}
    if isinstance(value, Mapping):
        return {"entries": {str(key): describe(entry) for key, entry in value.items()}}
    if isinstance(value, (list, tuple)):
        return {"items": [describe(item) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    return {"unknown": type(value).__name__}


def from_description(described: Mapping[str, Any]) -> Any:
    """Inputs of that description, of zeros.

    Raises:
        FastslimValueError: one that cannot be described.
    """
    if "shape" in described:
        return torch.zeros(described["shape"], dtype=getattr(torch, described["dtype"]))
    if "entries" in described:
        return {key: from_description(entry) for key, entry in described["entries"].items()}
    if "items" in described:
        return tuple(from_description(item) for item in described["items"])
    if "value" in described:
        return described["value"]
    raise FastslimValueError(
        f"an input of the network is a {described.get('unknown')}, which the file does not hold: pass example_inputs"
    )
