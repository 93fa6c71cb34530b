"""`fastslim.sort_channels`: the most important channels of every unit first, so that prefixes keep the best."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastslim.errors import FastslimRuntimeError, FastslimTypeError
from fastslim.graph import Trace, trace
from fastslim.graph.capture import bind_inputs
from fastslim.graph.units import DimSpec
from fastslim.mutators.channel_mutator import ChannelMutator
from fastslim.mutators.convert import mutator_of
from fastslim.mutators.function_check import FunctionCheck
from fastslim.mutators.importance import granule_importance
from fastslim.nn import SwitchableBatchNorm2d


def sort_channels(model: nn.Module, example_inputs: Any = None, importance: str = "l1") -> dict[str, Tensor]:
    """Reorders the channels of every unit by importance, in place; at full width the model computes the same.

    For networks with pretrained weights, before training and before the optimizer is made: its state, and copies of
    the weights kept elsewhere (an average, a teacher), are not reordered. Parameters and buffers keep their identity
    and their names.

    The importance of a channel is the sum, over all layers of its unit,

    - "l1", "l2": of the L1 or L2 norm of the weights that produce the channel (Li et al., Pruning Filters for
      Efficient ConvNets, ICLR 2017, section 3.1, where it is L1);
    - "bn": of the absolute scales with which norms multiply the channel (Liu et al., Learning Efficient
      Convolutional Networks through Network Slimming, ICCV 2017, section 3); "l1" in units without such a norm.

    Channels that must stay together, such as an attention head or the group of a grouped convolution, move together,
    by the sum of their importances. Units that cannot be slimmed, and those behind a channel shuffle, keep their order.

    Afterwards the outputs, and the norm of what every layer returns, are compared with those before, on the example
    inputs in evaluation mode. A unit whose order forward depends on, in a way that a prefix does not mind (a running
    sum over channels, noise, a constant for each channel that is no parameter or buffer), is put back with a warning.
    After any error the model is as it was.

    Args:
        model: a converted model, an algorithm such as `AutoSlim`, or a plain model, which stays plain.
        example_inputs: what forward is called with, as for `fastslim.convert`; needed for a plain model.
        importance: "l1", "l2" or "bn".

    Returns:
        By unit name the old channel at each new position, ``(channels,)``; of the units that were sorted.

    Raises:
        FastslimRuntimeError: when the batch norms have statistics of their own for narrow widths.
        FastslimTypeError: when a plain model comes without example inputs, or they do not fit its forward.
        FastslimValueError: for an unknown importance.
    """
    mutator, found = _analysed(model, example_inputs)
    if any(isinstance(module, SwitchableBatchNorm2d) for module in found.model.modules()):
        raise FastslimRuntimeError(
            "the batch norms have statistics of their own for narrow widths, which no reordering fits; sort the plain "
            "model first: fastslim.sort_channels(model, example_inputs)"
        )
    if hasattr(model, "drop_calibration"):
        model.drop_calibration()
    # The network may have changed its device or type since it was traced.
    inputs = bind_inputs(found.model, found.example_inputs if example_inputs is None else example_inputs)
    orders = _orders(found, importance)
    with _full_width(mutator):
        done = _Sorter(found, orders, FunctionCheck(found, inputs)).sort()
    left = [found.units[unit].name for unit in orders if unit not in done]
    if left:
        warnings.warn(
            f"{len(left)} of {len(orders)} units keep the order of their channels, on which forward depends: "
            f"{', '.join(left)}",
            stacklevel=2,
        )
    return {spec.name: _spread(orders[unit], spec.granularity) for unit, spec in enumerate(found.units) if unit in done}


def _analysed(model: Any, example_inputs: Any) -> tuple[ChannelMutator | None, Trace]:
    mutator = model if isinstance(model, ChannelMutator) else None
    if mutator is None:
        if not isinstance(model, nn.Module):
            raise FastslimTypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
        mutator = mutator_of(model) or getattr(model, "mutator", None)
    if isinstance(mutator, ChannelMutator):
        return mutator, mutator.trace
    if example_inputs is None:
        raise FastslimTypeError(
            f"this {type(model).__name__} is not converted, so example_inputs are needed: what its forward is called "
            "with, or the shape of one float tensor such as (1, 3, 224, 224)"
        )
    return None, trace(model, example_inputs)


@contextlib.contextmanager
def _full_width(mutator: ChannelMutator | None) -> Iterator[None]:
    """All units at their full width, whether that is among their choices or not."""
    units = [] if mutator is None else mutator.units
    widths = [unit.width for unit in units]
    try:
        for unit in units:
            unit.width = unit.num_channels
        if mutator is not None:
            mutator._apply()
        yield
    finally:
        for unit, width in zip(units, widths, strict=True):
            unit.width = width
        if mutator is not None:
            mutator._apply()


def _orders(found: Trace, importance: str) -> dict[int, Tensor]:
    """By unit index, the old granule at each new position."""
    return {
        unit: torch.argsort(values, descending=True, stable=True)
        for unit, values in sorted(granule_importance(found, importance).items())
        if found.units[unit].mutable and not found.units[unit].counted
    }


def _spread(order: Tensor, entries: int) -> Tensor:
    """The order of runs of `entries` entries, as an order of the entries."""
    return (order[:, None] * entries + torch.arange(entries)).flatten()


class _Sorter:
    """Permutes parameters and buffers, as many units as the function allows."""

    def __init__(self, found: Trace, orders: dict[int, Tensor], check: FunctionCheck) -> None:
        self.trace, self.orders, self.check = found, orders, check
        self.tensors: dict[Any, tuple[Tensor, tuple[DimSpec, ...]]] = {}
        for named in (found.model.named_parameters, found.model.named_buffers):
            for name, tensor in named():
                # Several names, and several tensors, may stand for the same memory.
                key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
                self.tensors.setdefault(key, (tensor, found.tensors[name]))
        self.done: set[int] = set()

    def sort(self) -> set[int]:
        """Sorts; returns the units for which the model computes the same."""
        try:
            if not self._try(list(self.orders)):
                self._try_halves(list(self.orders))
        except BaseException:
            self._permute(self.done, back=True)
            raise
        return self.done

    def _try(self, units: list[int]) -> bool:
        self._permute(units)
        if self.check.holds():
            return True
        self._permute(units, back=True)
        return False

    def _try_halves(self, units: list[int]) -> None:
        """Sorts what it can of units that cannot be sorted all together."""
        middle = len(units) // 2
        for half in (units[:middle], units[middle:]) if middle else ():
            if not self._try(half):
                self._try_halves(half)

    def _permute(self, units: Iterable[int], back: bool = False) -> None:
        chosen = {unit: self.orders[unit].argsort() if back else self.orders[unit] for unit in units}
        moved: list[tuple[Tensor, int, Tensor]] = []
        try:
            for tensor, dims in self.tensors.values():
                for dim, parts in enumerate(dims):
                    if any(unit in chosen for unit, _ in parts):
                        index = _index(parts, chosen)
                        _reorder(tensor, dim, index)
                        moved.append((tensor, dim, index))
        except BaseException:
            for tensor, dim, index in reversed(moved):
                _reorder(tensor, dim, index.argsort())
            raise
        self.done = self.done - chosen.keys() if back else self.done | chosen.keys()


def _index(parts: DimSpec, orders: Mapping[int, Tensor]) -> Tensor:
    """The old entry at each new place of a dimension, for orders of granules by unit."""
    pieces, start = [], 0
    for unit, entries in parts:
        order = None if unit is None else orders.get(unit)
        pieces.append(start + (torch.arange(entries) if order is None else _spread(order, entries // len(order))))
        start += entries
    return torch.cat(pieces)


@torch.no_grad()
def _reorder(tensor: Tensor, dim: int, index: Tensor) -> None:
    tensor.copy_(tensor.index_select(dim, index.to(tensor.device)))
