"""Multiply-adds of the steps of a forward, as sums of products of dimensions that follow the widths."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastslim.graph.steps import Step, TensorSpec
from fastslim.graph.units import DimSpec, LayerSpec

if TYPE_CHECKING:
    from fastslim.graph.trace import Trace

# A constant, and the dimensions it is multiplied with.
Product = tuple[int, tuple[DimSpec, ...]]
_MATRIX_PRODUCTS = ("linear", "matmul", "mm", "bmm", "mv", "addmm", "baddbmm", "__matmul__", "__rmatmul__")


def multiply_adds(step: Step, trace: Trace) -> list[Product]:
    """Multiply-adds of a step for all samples of the example inputs, as a sum of products.

    Products of two activations (attention scores) are not counted, nor are normalisation and embeddings.
    """
    tensors = [value for value in (*step.args, *(value for _, value in step.kwargs)) if isinstance(value, TensorSpec)]
    if not step.makes or not tensors:
        return []
    out = trace.forward.activations[step.makes[0]].dims
    layer = trace.layers.get(step.module)
    if layer is not None:
        return _of_layer(layer, tensors, out)
    return [] if step.module or len(tensors) < 2 else _of_function(step.function.rpartition(".")[2], tensors, out)


def multiply_adds_by_layer(trace: Trace) -> dict[str, int]:
    """Multiply-adds of each layer at full width, for one sample, by module name."""
    found: dict[str, int] = {}
    for step in trace.forward.steps:
        if step.module:
            full = sum(factor * math.prod(map(_full, dims)) for factor, dims in multiply_adds(step, trace))
            found[step.module] = found.get(step.module, 0) + full
    return {name: total // trace.forward.samples for name, total in found.items()}


def _full(dim: DimSpec) -> int:
    return sum(channels for _, channels in dim)


def _of_layer(layer: LayerSpec, tensors: list[TensorSpec], out: tuple[DimSpec, ...]) -> list[Product]:
    reads = (layer.kernel * layer.in_per_group, ()) if layer.in_per_group else (layer.kernel, (layer.input_dim,))
    if layer.kind in ("conv", "linear"):
        return [(reads[0], (*out, *reads[1]))]
    if layer.kind == "conv_transpose":  # every weight is read once per input position
        samples, _, *positions = tensors[0].dims
        return [(reads[0], (samples, *positions, layer.out, *reads[1]))]
    if layer.kind == "attention":
        query, key, value = (tensors * 3)[:3] if len(tensors) < 3 else tensors[:3]
        projections = ((query, layer.input_dim), (key, layer.key), (value, layer.value), (query, layer.out))
        return [(1, (*tensor.dims[:-1], layer.heads, dim)) for tensor, dim in projections]
    return []


def _of_function(name: str, tensors: list[TensorSpec], out: tuple[DimSpec, ...]) -> list[Product]:
    if name in ("conv1d", "conv2d", "conv3d"):
        return [(1, (*out, *tensors[1].dims[1:]))]
    if name.startswith("conv_transpose"):
        return [(1, (*tensors[0].dims, *tensors[1].dims[1:]))]
    if name in _MATRIX_PRODUCTS:
        one, other = tensors[-2:] if name in ("addmm", "baddbmm") else tensors[:2]
        if name == "linear" or one.stored or other.stored:
            return [(1, (*out, one.dims[-1]))]
    return []
