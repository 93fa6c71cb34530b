"""Rules for layers called as functions, with weights that are tensors of the graph."""

from __future__ import annotations

from typing import Any

from torch import fx

from fastslim.graph.known import Dim, Known, Layout, argument, is_tensor, shape_of
from fastslim.graph.parts import NotUnderstoodError
from fastslim.graph.propagate import Propagation, Rule
from fastslim.graph.rules_layer import convolve, divided


def _weight(p: Propagation, node: Any) -> list[Dim]:
    return list(p.dims(node))


def functional_conv(p: Propagation, node: fx.Node) -> Known:
    """``F.conv2d(x, weight, ...)``."""
    transposed = "transpose" in str(getattr(node.target, "__name__", ""))
    x, w, bias = argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 2, "bias")
    place = 6
    groups = argument(node, place, "groups", 1)
    path: tuple = (place,) if len(node.args) > place else ("groups",)
    dims, shape, weight = list(p.dims(x)), shape_of(x), _weight(p, w)
    if len(shape) != len(shape_of(w)):
        raise NotUnderstoodError("convolves without a batch dimension")
    for dim in (*dims[2:], *weight[2:]):
        p.keep_full(dim, "convolves across the channels")
    count = groups if isinstance(groups, int) else groups.meta["value"]
    if not (transposed and count > 1):
        p.produce(weight[1 if transposed else 0], p.frame.name or type(p.model).__name__)
    channels = (shape[1], shape_of(node)[1])
    source, out = convolve(p, dims[1], weight, channels, count, transposed)
    if count > 1:
        p.want(node, path, divided(p, source, channels[0] // count), count)
    if is_tensor(bias):
        out = p.tie(out, p.dims(bias)[0], channels[1])
    return Layout((dims[0], out, *[None] * (len(shape) - 2)))


def functional_linear(p: Propagation, node: fx.Node) -> Known:
    """``F.linear(x, weight, bias)``."""
    x, w, bias = argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 2, "bias")
    dims, weight = p.dims(x), _weight(p, w)
    if len(weight) != 2:
        raise NotUnderstoodError("multiplies by a vector")
    p.produce(weight[0], p.frame.name or type(p.model).__name__)
    p.tie(weight[1], dims[-1], shape_of(x)[-1])
    out = weight[0]
    if is_tensor(bias):
        out = p.tie(out, p.dims(bias)[0], shape_of(node)[-1])
    return Layout((*dims[:-1], p.resolved(out)))


def functional_embedding(p: Propagation, node: fx.Node) -> Known:
    """``F.embedding(indices, weight)``."""
    indices, w = argument(node, 0, "input"), argument(node, 1, "weight")
    weight = _weight(p, w)
    p.keep_full(weight[0], "is looked up by index")
    return Layout((*p.dims(indices), weight[1]))


def functional_norm(p: Propagation, node: fx.Node) -> Known:
    """``F.batch_norm`` and ``F.instance_norm``: vectors follow the channels of dimension 1."""
    x = argument(node, 0, "input")
    dims, size = list(p.dims(x)), shape_of(x)[1]
    for other in node.all_input_nodes:
        if other is not x and is_tensor(other) and shape_of(other) == (size,):
            dims[1] = p.tie(dims[1], p.dims(other)[0], size)
    return Layout(tuple(dims))


def functional_group_norm(p: Propagation, node: fx.Node) -> Known:
    """``F.group_norm(x, num_groups)`` keeps the size of its groups."""
    x, groups = argument(node, 0, "input"), argument(node, 1, "num_groups")
    result = functional_norm(p, node)
    assert isinstance(result, Layout)
    dim = result.dims[1]
    if dim is not None:
        count = groups if isinstance(groups, int) else groups.meta["value"]
        path: tuple = (1,) if len(node.args) > 1 else ("num_groups",)
        if count == 1:
            return result
        p.want(node, path, p.units.divided(dim, shape_of(x)[1] // count), count)
    return result


def functional_layer_norm(p: Propagation, node: fx.Node) -> Known:
    """``F.layer_norm(x, normalized_shape, weight, bias)`` and ``F.rms_norm``."""
    x, shape = argument(node, 0, "input"), argument(node, 1, "normalized_shape")
    dims = list(p.dims(x))
    first = len(dims) - len(shape)
    for other in node.all_input_nodes:
        if other is not x and is_tensor(other) and shape_of(other) == shape_of(x)[first:]:
            for d, own in enumerate(p.dims(other)):
                dims[first + d] = p.tie(dims[first + d], own, shape_of(x)[first + d])
    key: Any = 1 if len(node.args) > 1 else "normalized_shape"
    for d in range(first, len(dims)):
        p.want(node, (key, d - first), dims[d], shape_of(x)[d])
    return Layout(tuple(dims))


def functional_prelu(p: Propagation, node: fx.Node) -> Known:
    """``F.prelu(x, weight)``."""
    x, w = node.args[:2]
    dims = list(p.dims(x))
    if shape_of(w) != (1,):
        dims[1] = p.tie(dims[1], p.dims(w)[0], shape_of(x)[1])
    return Layout(tuple(dims))


def weight_norm(p: Propagation, node: fx.Node) -> Known:
    """``torch._weight_norm(v, g, dim)``: a weight of the given lengths."""
    v, g = node.args[:2]
    dims = list(p.dims(v))
    for d, (own, size) in enumerate(zip(p.dims(g), shape_of(g), strict=True)):
        if size > 1:
            dims[d] = p.tie(dims[d], own, size)
    return Layout(tuple(dims))


NAMED: dict[str, Rule] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), functional_conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), functional_conv),
    "linear": functional_linear,
    "embedding": functional_embedding,
    **dict.fromkeys(("batch_norm", "instance_norm"), functional_norm),
    "group_norm": functional_group_norm,
    **dict.fromkeys(("layer_norm", "rms_norm"), functional_layer_norm),
    "prelu": functional_prelu,
    "_weight_norm": weight_norm,
}
