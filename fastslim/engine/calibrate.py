"""Batch normalisation statistics for chosen subnets, all in one pass over the data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastslim import errors
from fastslim.algorithms import SlimmableAlgorithm
from fastslim.nn import SlimBatchNorm2d


class _Moments:
    """Mean and variance of a stream of batches, merged exactly (Chan et al., 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, count: int, mean: Tensor, unbiased_var: Tensor) -> None:
        # A copy: the next batch overwrites the running statistics these are views of.
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
    layers = algo.slim_batch_norms()
    moments = [{name: _Moments() for name in layers} for _ in subnets]
    seen = 0
    with _statistics_of_one_batch(algo, layers) as counts:
        for index, data in enumerate(loader):
            if num_batches is not None and index >= num_batches:
                break
            inputs = algo.unpack(data).inputs
            seen += 1
            for choices, own in zip(subnets, moments, strict=True):
                algo.mutator.set_choices(choices)
                algo.call(algo.architecture, inputs)
                for name, layer in layers.items():
                    if name in counts:  # layers the forward pass did not use have no statistics
                        mean, var = _active(layer, counts[name][1])
                        own[name].add(counts[name][0], mean, var)
    if not seen:
        raise errors.FastslimValueError("the calibration loader yields no batch; give it data, or num_batches >= 1")
    for choices, own in zip(subnets, moments, strict=True):
        statistics = {
            name: own[name].result(layer.running_mean) for name, layer in layers.items() if own[name].mean is not None
        }
        algo.store_calibration(choices, statistics)


def _active(layer: SlimBatchNorm2d, channels: int) -> tuple[Tensor, Tensor]:
    """The batch's statistics that a forward pass left in the active part of the running ones."""
    if layer.segments is None:
        return layer.running_mean[:channels], layer.running_var[:channels]
    mean, var = (
        torch.cat([full[start : start + count] for start, count in layer.segments])
        for full in (layer.running_mean, layer.running_var)
    )
    return mean, var


@contextlib.contextmanager
def _statistics_of_one_batch(
    algo: SlimmableAlgorithm, layers: Mapping[str, SlimBatchNorm2d]
) -> Iterator[dict[str, tuple[int, int]]]:
    """Evaluation mode, but batch normalisation leaves each batch's own statistics in the running ones.

    Gives ``{layer: (values per channel, channels)}`` of the latest forward pass; everything is put
    back at the end.
    """
    modes = {module: module.training for module in algo.modules()}
    before = {name: [b.clone() for b in layer.buffers()] for name, layer in layers.items()}
    momenta = {name: layer.momentum for name, layer in layers.items()}
    counts: dict[str, tuple[int, int]] = {}

    def count(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            counts[name] = (args[0].numel() // args[0].shape[1], args[0].shape[1])

        return hook

    handles = [layer.register_forward_pre_hook(count(name)) for name, layer in layers.items()]
    try:
        algo.eval()
        for layer in layers.values():
            layer.train()
            layer.momentum = 1.0
        yield counts
    finally:
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            layer.momentum = momenta[name]
            for buffer, old in zip(layer.buffers(), before[name], strict=True):
                buffer.copy_(old)
        for module, mode in modes.items():
            module.training = mode
