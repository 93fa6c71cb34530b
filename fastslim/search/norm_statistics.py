"""Batch normalisation while subnets are compared: each batch's own statistics, or ones calibrated for the subnet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastslim.algorithms import Batch, SlimmableAlgorithm
from fastslim.nn import SlimBatchNorm, SwitchableBatchNorm2d


class NormStatistics:
    """A context in which an algorithm evaluates subnets; its modes and statistics are put back at the end.

    Args:
        algo: whose network is in evaluation mode inside.
    """

    def __init__(self, algo: SlimmableAlgorithm) -> None:
        self.algo = algo
        # A layer without running statistics always normalises by the batch.
        self.layers = {name: layer for name, layer in algo.slim_batch_norms().items() if layer.running_mean is not None}

    def __enter__(self) -> NormStatistics:
        self.modes = {module: module.training for module in self.algo.modules()}
        self.buffers = {name: [b.clone() for b in layer.buffers()] for name, layer in self.layers.items()}
        self.momenta = {name: layer.momentum for name, layer in self.layers.items()}
        self.calibrated = {name: getattr(layer, "calibrated", None) for name, layer in self.layers.items()}
        self.algo.eval()
        self.by_batch()
        return self

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for name, layer in self.layers.items():
                layer.momentum, layer.calibrated = self.momenta[name], self.calibrated[name]
                for buffer, old in zip(layer.buffers(), self.buffers[name], strict=True):
                    buffer.copy_(old)
        for module, mode in self.modes.items():
            module.training = mode

    def by_batch(self) -> None:
        """Every batch is normalised by its own statistics."""
        for layer in self.layers.values():
            layer.train()

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """The subnet that is set is normalised by its statistics over all these batches.

        The same numbers as `fastslim.calibrate_batch_norm`; they are kept for this subnet only until the next one.
        """
        moments: dict[str, _Moments] = {}
        handles = [layer.register_forward_hook(_recorder(name, layer, moments)) for name, layer in self.layers.items()]
        try:
            for layer in self.layers.values():
                layer.train()
                layer.momentum = 1.0  # each call leaves its own statistics in the running ones
            for batch in batches:
                self.algo.call(self.algo.architecture, batch.inputs)
        finally:
            for handle in handles:
                handle.remove()
        for name, layer in self.layers.items():
            layer.eval()
            layer.calibrated = moments[name].result(layer.running_mean) if name in moments else None


class _Moments:
    """Mean and variance of a stream of batches, merged exactly (Chan et al., 1979)."""

    def __init__(self, count: int, mean: Tensor, unbiased_var: Tensor) -> None:
        self.count = count
        self.mean = mean.to(torch.float64, copy=True)
        self.squares = unbiased_var.double() * (count - 1)

    def add(self, other: _Moments) -> None:
        total = self.count + other.count
        delta = other.mean - self.mean
        self.squares += other.squares + delta.square() * (self.count * other.count / total)
        self.mean += delta * (other.count / total)
        self.count = total

    def result(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean.to(like), (self.squares / max(self.count - 1, 1)).to(like)


def _recorder(name: str, layer: Any, moments: dict[str, _Moments]) -> Callable[..., None]:
    def record(_: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        channels = args[0].shape[1]
        if isinstance(layer, SwitchableBatchNorm2d) and channels != layer.num_features:
            return  # the layer of that width, a submodule, has been called and speaks for itself
        segments = layer.segments if isinstance(layer, SlimBatchNorm) else layer.forward.segments
        ranges = ((0, channels),) if segments is None else segments
        mean, var = (
            torch.cat([full[start : start + count] for start, count in ranges])
            for full in (layer.running_mean, layer.running_var)
        )
        of_batch = _Moments(args[0].numel() // channels, mean, var)
        if name in moments:
            moments[name].add(of_batch)
        else:
            moments[name] = of_batch

    return record
