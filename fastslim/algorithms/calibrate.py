"""Batch normalisation statistics for chosen subnets, all in one pass over the data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastslim import errors
from fastslim.algorithms.slimmable import SlimmableAlgorithm
from fastslim.nn import SlimBatchNorm, SwitchableBatchNorm2d


class _Moments:
    """Mean and variance of a stream of batches, merged exactly (Chan et al., 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, count: int, mean: Tensor, unbiased_var: Tensor) -> None:
        mean, squares = mean.to(torch.float64, copy=True), unbiased_var.double() * (count - 1)
        if self.mean is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total = self.count + count
        delta = mean - self.mean
        self.squares += squares + delta.square() * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def result(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean.to(like), (self.squares / max(self.count - 1, 1)).to(like)


@torch.no_grad()
def calibrate_batch_norm(
    algo: SlimmableAlgorithm,
    loader: Iterable[Any],
    subnets: Sequence[Mapping[str, int]],
    num_batches: int | None = None,
) -> None:
    """Computes the batch normalisation statistics of many subnets in one pass over the data.

    The running statistics a slimmable network trains with mix all widths and fit none. Statistics
    are kept in `algo` by subnet; ``algo.set_subnet`` selects them; the next training step drops them.
    Source: Yu and Huang, Universally Slimmable Networks (ICCV 2019), section 3.3.

    Args:
        algo: the algorithm whose subnets are evaluated.
        loader: yields batches as for training.
        subnets: dicts from unit name to width, such as ``algo.uniform_subnet(0.5)``.
        num_batches: use the first batches only.

    Raises:
        FastslimValueError: the loader is empty.
    """
    before = algo.mutator.current_choices
    # A layer without running statistics always normalises by the batch: nothing to calibrate.
    layers = {name: layer for name, layer in algo.slim_batch_norms().items() if layer.running_mean is not None}
    moments = [{name: _Moments() for name in layers} for _ in subnets]
    device = next(algo.architecture.parameters()).device
    seen = 0
    try:
        with _statistics_of_every_call(algo, layers) as calls:
            for index, data in enumerate(loader):
                if num_batches is not None and index >= num_batches:
                    break
                inputs = torch.utils._pytree.tree_map(
                    lambda value: value.to(device) if isinstance(value, Tensor) else value,
                    algo.unpack(data, training=False).inputs,
                )
                seen += 1
                for choices, own in zip(subnets, moments, strict=True):
                    calls.clear()
                    algo.mutator.set_choices(choices)
                    algo.call(algo.architecture, inputs)
                    for name, count, mean, var in calls:
                        own[name].add(count, mean, var)
        if not seen:
            raise errors.FastslimValueError("the calibration loader yields no batch; give it data, or num_batches >= 1")
        for choices, own in zip(subnets, moments, strict=True):
            # A layer that evaluation does not reach has no statistics, and needs none.
            statistics = {
                name: own[name].result(layer.running_mean)
                for name, layer in layers.items()
                if own[name].mean is not None
            }
            algo.store_calibration(choices, statistics)
    finally:
        algo.set_subnet(before)


def _active(layer: Any, channels: int) -> tuple[Tensor, Tensor]:
    """The batch's statistics that a forward pass left in the active part of the running ones."""
    segments = layer.segments if isinstance(layer, SlimBatchNorm) else layer.forward.segments
    if segments is None:
        return layer.running_mean[:channels], layer.running_var[:channels]
    mean, var = (
        torch.cat([full[start : start + count] for start, count in segments])
        for full in (layer.running_mean, layer.running_var)
    )
    return mean, var


@contextlib.contextmanager
def _statistics_of_every_call(
    algo: SlimmableAlgorithm, layers: Mapping[str, Any]
) -> Iterator[list[tuple[str, int, Tensor, Tensor]]]:
    """Evaluation mode, but batch normalisation works with each batch's own statistics.

    Gives a list that grows by ``(layer, values per channel, mean, variance)`` with every call of a
    layer; everything is put back at the end.
    """
    modes = {module: module.training for module in algo.modules()}
    before = {name: [b.clone() for b in layer.buffers()] for name, layer in layers.items()}
    momenta = {name: layer.momentum for name, layer in layers.items()}
    calls: list[tuple[str, int, Tensor, Tensor]] = []

    def record(name: str):
        def hook(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            channels = args[0].shape[1]
            if isinstance(layer, SwitchableBatchNorm2d) and channels != layer.num_features:
                return  # the layer of that width, a submodule, has been called and speaks for itself
            mean, var = _active(layer, channels)
            calls.append((name, args[0].numel() // channels, mean.clone(), var.clone()))

        return hook

    handles = [layer.register_forward_hook(record(name)) for name, layer in layers.items()]
    try:
        algo.eval()
        for layer in layers.values():
            layer.train()
            layer.momentum = 1.0  # each call leaves its own statistics in the running ones
        yield calls
    finally:
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            layer.momentum = momenta[name]
            for buffer, old in zip(layer.buffers(), before[name], strict=True):
                buffer.copy_(old)
        for module, mode in modes.items():
            module.training = mode
