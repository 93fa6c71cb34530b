"""Batch normalisation while subnets are compared: each batch's own statistics, or ones calibrated for the subnet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastslim.algorithms.base import Batch
from fastslim.algorithms.slimmable import SlimmableAlgorithm, Statistics
from fastslim.nn import SlimBatchNorm, SwitchableBatchNorm2d


class Moments:
    """Mean and variance of a stream of batches, merged exactly (Chan et al., 1979).

    Args:
        count: values per channel in the first batch.
        mean: of each channel.
        unbiased_var: of each channel.
    """

    def __init__(self, count: int, mean: Tensor, unbiased_var: Tensor) -> None:
        self.count = count
        self.mean = mean.to(torch.float64, copy=True)
        self.squares = unbiased_var.double() * (count - 1)

    def add(self, other: Moments) -> None:
        """Merges those of another batch in."""
        total = self.count + other.count
        delta = other.mean - self.mean
        self.squares += other.squares + delta.square() * (self.count * other.count / total)
        self.mean += delta * (other.count / total)
        self.count = total

    def result(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance, in the precision of a tensor."""
        return self.mean.to(like), (self.squares / max(self.count - 1, 1)).to(like)


class NormStatistics:
    """A context in which an algorithm evaluates subnets; its modes and statistics are put back at the end.

    Inside, batch normalisation works with each batch's own statistics until :meth:`use` says otherwise, and all else
    is in evaluation mode.

    Args:
        algo: whose network it is.

    Attributes:
        layers: those that have statistics, by name; one without always normalises by the batch.
        sink: where :meth:`recording` puts the moments of the layers that are called.
    """

    def __init__(self, algo: SlimmableAlgorithm) -> None:
        self.algo = algo
        self.layers = {name: layer for name, layer in algo.slim_batch_norms().items() if layer.running_mean is not None}
        self.sink: dict[str, Moments] = {}

    def __enter__(self) -> NormStatistics:
        self._modes = {module: module.training for module in self.algo.modules()}
        self._buffers = {name: [b.clone() for b in layer.buffers()] for name, layer in self.layers.items()}
        self._momenta = {name: layer.momentum for name, layer in self.layers.items()}
        self._calibrated = {name: getattr(layer, "calibrated", None) for name, layer in self.layers.items()}
        self.algo.eval()
        self.by_batch()
        return self

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for name, layer in self.layers.items():
                layer.momentum, layer.calibrated = self._momenta[name], self._calibrated[name]
                for buffer, old in zip(layer.buffers(), self._buffers[name], strict=True):
                    buffer.copy_(old)
        for module, mode in self._modes.items():
            module.training = mode

    def by_batch(self) -> None:
        """Every batch is normalised by its own statistics."""
        for layer in self.layers.values():
            layer.train()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Every batch is normalised by its own statistics, which are added to `sink`."""
        handles = [layer.register_forward_hook(self._recorder(name, layer)) for name, layer in self.layers.items()]
        try:
            self.by_batch()
            for layer in self.layers.values():
                layer.momentum = 1.0  # each call leaves its own statistics in the running ones
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """The subnet that is set is normalised by its statistics over all these batches, until the next one."""
        with self.recording():
            self.sink = {}
            for batch in batches:
                self.algo.call(self.algo.architecture, batch.inputs)
        self.use(self.results(self.sink))

    def results(self, moments: Mapping[str, Moments]) -> Statistics:
        """Statistics of the layers that were called; one that evaluation does not reach has none, and needs none."""
        return {name: own.result(self.layers[name].running_mean) for name, own in moments.items()}

    def use(self, statistics: Statistics) -> None:
        """Normalises by these statistics from now on."""
        for name, layer in self.layers.items():
            layer.eval()
            layer.calibrated = statistics.get(name)

    def _recorder(self, name: str, layer: Any) -> Callable[..., None]:
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
            of_batch = Moments(args[0].numel() // channels, mean, var)
            if name in self.sink:
                self.sink[name].add(of_batch)
            else:
                self.sink[name] = of_batch

        return record
