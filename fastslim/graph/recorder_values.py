"""Nested arguments and results of a recorded call: the tensors and sizes in them."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastslim.graph.counts import Count, plain


def fresh(result: Any, args: tuple) -> Any:
    """The result, with a tensor that is an argument itself as a new object: nodes are told by the tensors' identity."""
    if isinstance(result, Tensor):
        if any(result is arg for arg in args):
            with torch._C.DisableTorchFunction():
                return result.view(result.shape) if result.layout is torch.strided else result
        return result
    if type(result) in (tuple, list):
        return type(result)(fresh(item, args) for item in result)
    return result


def leaf_values(value: Any) -> Iterator[Any]:
    """Tensors and sizes in the order in which `Recorder._leaves` takes them out."""
    if isinstance(value, (Tensor, Count)):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from leaf_values(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaf_values(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from leaf_values(getattr(value, field.name))


def values_in(value: Any, depth: int = 6) -> Iterator[Any]:
    """All tensors and sizes in an object."""
    if isinstance(value, (Tensor, Count)):
        yield value
    elif value is None or isinstance(value, (int, float, str, bytes, type, nn.Module, torch.dtype)) or depth == 0:
        return
    elif isinstance(value, (tuple, list, set)):
        for item in value:
            yield from values_in(item, depth - 1)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from values_in(item, depth - 1)
    elif hasattr(value, "__dict__") and not callable(value):
        for item in vars(value).values():
            yield from values_in(item, depth - 1)


def plain_values(value: Any) -> Any:
    """The same with sizes as ordinary integers."""
    if isinstance(value, Count):
        return plain(value)
    if isinstance(value, (tuple, list)) and any(not isinstance(item, Tensor) for item in value):
        items = [plain_values(item) for item in value]
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if type(value) is dict:
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*map(plain_values, (value.start, value.stop, value.step)))
    return value


def describe_value(node: fx.Node, value: Any) -> None:
    """Notes the shape of a tensor and whose memory it looks at, or a number, at its node."""
    if isinstance(value, Tensor):
        with torch._C.DisableTorchFunction():
            node.meta.update(shape=tuple(value.shape), dtype=value.dtype)
            if value.layout is torch.strided and not value.is_contiguous():
                node.meta["strides"] = value.stride()
            with contextlib.suppress(NotImplementedError, RuntimeError):  # sparse tensors, and those inside a transform
                node.meta["storage"] = StorageWeakRef(value.untyped_storage())
    else:
        node.meta["value"] = plain(value)


def python_random_state() -> Any:
    """The state of Python's and numpy's generators, comparable."""
    numpy = sys.modules.get("numpy")
    state = None if numpy is None else numpy.random.get_state()
    return random.getstate(), None if state is None else (state[1].tobytes(), *state[2:])


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """A module's attributes and buffers as they are now, for `same_attributes`."""
    attributes = {**vars(module), **module._buffers}
    return {name: plain(value) for name, value in attributes.items() if name not in ("training", "forward")}


def same_attributes(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether numbers, strings and flags are equal, and all else the same objects."""
    return one.keys() == other.keys() and all(
        value is other[name] or (isinstance(value, (int, float, str)) and value == other[name])
        for name, value in one.items()
    )
