"""How important the channels of each unit are, by the weights that produce them or the norms that scale them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastslim.errors import FastslimValueError, nearest
from fastslim.graph import LayerSpec, Trace
from fastslim.graph.units import DimSpec

IMPORTANCES = ("l1", "l2", "bn")
_NORMS = ("bn", "layer_norm", "rms_norm", "group_norm", "instance_norm")


def granule_importance(trace: Trace, importance: str) -> dict[int, Tensor]:
    """Importance of the granules of each unit: the runs of ``granularity`` channels that stay together.

    Args:
        trace: of the model whose weights are looked at.
        importance: "l1", "l2" or "bn", as `fastslim.sort_channels` explains them.

    Returns:
        By unit index a float64 vector of ``channels // granularity`` sums over the granule's channels. A unit that no
        weight produces is missing.

    Raises:
        FastslimValueError: for another importance.
    """
    if importance not in IMPORTANCES:
        raise FastslimValueError(f"importance={importance!r} is unknown; {nearest(str(importance), IMPORTANCES)}")
    order = 2.0 if importance == "l2" else 1.0
    found = _sum(trace, _produced, order)
    for unit, sums in _sum(trace, _used_directly, order).items():
        found.setdefault(unit, sums)
    return {**found, **_sum(trace, _scaled, 1.0)} if importance == "bn" else found


# A weight, the dimension that runs over the channels it makes, and the parts of that dimension.
Weights = Iterator[tuple[Tensor, int, DimSpec]]


def _sum(trace: Trace, weights: Callable[[Trace], Weights], order: float) -> dict[int, Tensor]:
    result: dict[int, Tensor] = {}
    seen: set[tuple[int, int]] = set()
    for weight, dim, parts in weights(trace):
        if (id(weight), dim) in seen:  # tied: one weight under two names
            continue
        seen.add((id(weight), dim))
        # A norm of each entry of the dimension, over all that make it.
        rows = weight.detach().movedim(dim, 0).reshape(weight.shape[dim], -1)
        norms = torch.linalg.vector_norm(rows, order, dim=1, dtype=torch.float64).cpu()
        start = 0
        for unit, entries in parts:
            if unit is not None:
                spec = trace.units[unit]
                sums = norms[start : start + entries].view(spec.channels // spec.granularity, -1).sum(1)
                result[unit] = result[unit] + sums if unit in result else sums
            start += entries
    return result


def _parameters_of(trace: Trace, layer: LayerSpec) -> Iterator[tuple[str, Tensor, tuple[DimSpec, ...]]]:
    for key, parameter in trace.model.get_submodule(layer.name).named_parameters():
        name = f"{layer.name}.{key}" if layer.name else key
        if name in trace.tensors:
            yield key, parameter, trace.tensors[name]


def _produced(trace: Trace) -> Weights:
    """Weights of layers that make channels."""
    for layer in trace.layers.values():
        # (in, out, ...) are transposed convolutions without groups, (rows, out) embeddings; all others (out, in, ...).
        second = layer.kind == "embedding" or (layer.kind == "conv_transpose" and layer.in_per_group is None)
        for _, parameter, dims in _parameters_of(trace, layer):
            if parameter.dim() > 1 and layer.kind not in _NORMS:
                yield parameter, int(second), dims[int(second)]


def _used_directly(trace: Trace) -> Weights:
    """Weights that forward uses without a layer, ``F.conv2d(x, self.weight)``."""
    for name, parameter in trace.model.named_parameters():
        if parameter.dim() > 1 and parameter.numel() > max(parameter.shape):
            yield parameter, 0, trace.tensors[name][0]


def _scaled(trace: Trace) -> Weights:
    """Scales of norms."""
    for layer in trace.layers.values():
        for key, parameter, dims in _parameters_of(trace, layer):
            if layer.kind in _NORMS and key == "weight":
                yield parameter, 0, dims[0]
