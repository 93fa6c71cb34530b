"""Rules for operations that rearrange dimensions, and for the sizes that forward computes with."""

from __future__ import annotations

import math
import operator
from typing import Any

from torch import fx, nn

from fastslim.graph.propagate import Channels, Known, NotUnderstoodError, Propagation, Rule, Size, is_tensor, shape_of
from fastslim.graph.units import Parts, scaled


def no_counts(rule: Rule) -> Rule:
    """The rule, refused when an argument other than a tensor depends on a channel count."""

    def checked(p: Propagation, node: fx.Node) -> Known:
        if any(not isinstance(p.known(n), Channels) and p.known(n) is not None for n in node.all_input_nodes):
            raise NotUnderstoodError("computes with a channel count")
        return rule(p, node)

    return checked


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or keyword."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def attribute(p: Propagation, node: fx.Node) -> Known:
    """``x.shape``, ``x.dtype`` and other attributes of a tensor."""
    x, name = p.channels(node.args[0]), node.args[1]
    if name == "shape":
        return _sizes(node.args[0], x)
    if x is not None and is_tensor(node) and name != "data":
        raise NotUnderstoodError(f"Tensor.{name} is not understood")
    return x if is_tensor(node) else None


def size(p: Propagation, node: fx.Node) -> Known:
    """``x.size()`` and ``x.size(dim)``."""
    x, dim = p.channels(node.args[0]), argument(node, 1, "dim")
    sizes = _sizes(node.args[0], x)
    return sizes if dim is None or sizes is None else sizes[dim]


def _sizes(tensor: Any, x: Channels | None) -> tuple | None:
    return None if x is None else tuple(Size(x.parts) if d == x.dim else None for d in range(len(shape_of(tensor))))


def no_channels(p: Propagation, node: fx.Node) -> Known:
    """A number that does not depend on any width, such as ``x.dim()``."""
    return None


def size_arithmetic(p: Propagation, node: fx.Node) -> Known:
    """A channel count times a number counts scaled channels; other arithmetic is not followed."""
    known = [p.known(argument) for argument in node.args]
    if all(k is None for k in known):
        return None
    if node.target is operator.mul and known.count(None) == 1:
        count, factor = node.args if known[0] is not None else node.args[::-1]
        factor = factor.meta.get("value") if isinstance(factor, fx.Node) else factor
        counted = p.known(count)
        if isinstance(counted, Size) and isinstance(factor, int):
            return Size(scaled(counted.parts, factor))
    raise NotUnderstoodError("computes with a channel count")


def getitem(p: Propagation, node: fx.Node) -> Known:
    """An element of a tuple or shape, or a tensor indexed outside its channels."""
    source, index = node.args
    known = p.known(source)
    if known is None:
        return None
    if isinstance(known, tuple):
        if not isinstance(index, (int, slice)):
            raise NotUnderstoodError("takes a computed element of a tuple")
        return known[index]
    if not isinstance(known, Channels):
        raise NotUnderstoodError("indexes a number")
    indices = list(index) if isinstance(index, tuple) else [index]
    if any(not (i is None or i is Ellipsis or isinstance(i, (int, slice))) for i in indices):
        raise NotUnderstoodError("indexes with a tensor or a computed number")
    taken = sum(isinstance(i, (int, slice)) for i in indices)
    rest = [slice(None)] * (len(shape_of(source)) - taken)
    at = indices.index(Ellipsis) if Ellipsis in indices else len(indices)
    indices[at : at + 1] = rest
    source_dim = out_dim = 0
    for i in indices:
        if i is None:
            out_dim += 1
            continue
        if source_dim == known.dim:
            if i != slice(None):
                raise NotUnderstoodError("takes some of the channels")
            return Channels(out_dim, known.parts)
        source_dim += 1
        out_dim += isinstance(i, slice)
    raise NotUnderstoodError("indexes more dimensions than there are")


def flatten(p: Propagation, node: fx.Node) -> Known:
    """``torch.flatten(x, start_dim, end_dim)``."""
    return _flatten(p, node, argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1))


def flatten_module(p: Propagation, node: fx.Node) -> Known:
    """``nn.Flatten``."""
    module = p.module(node)
    assert isinstance(module, nn.Flatten)
    return _flatten(p, node, module.start_dim, module.end_dim)


def _flatten(p: Propagation, node: fx.Node, start: int, end: int) -> Known:
    x = p.channels(node.args[0])
    if x is None:
        return None
    shape = shape_of(node.args[0])
    start, end = start % len(shape), end % len(shape)
    if x.dim < start:
        return x
    if x.dim > end:
        return Channels(x.dim - (end - start), x.parts)
    if x.dim != start:
        raise NotUnderstoodError("flattens channels into an outer dimension")
    return Channels(start, scaled(x.parts, math.prod(shape[start + 1 : end + 1])))


def view(p: Propagation, node: fx.Node) -> Known:
    """``x.view(n, -1)``, ``x.reshape(n, x.size(1), -1)`` and the like: inner dimensions join the channels."""
    source = node.args[0]
    x, shape, before = p.channels(source), shape_of(node), shape_of(source)
    given = _given_sizes(p, node, argument(node, 1, "shape", argument(node, 1, "size")))
    dim = x.dim if x is not None else None
    if any(isinstance(known, Size) and d != dim for d, (_, known) in enumerate(given)):
        raise NotUnderstoodError("puts a channel count into another dimension")
    if x is None:
        return None
    if shape[: x.dim] != before[: x.dim] or len(shape) <= x.dim or shape[x.dim] % before[x.dim]:
        raise NotUnderstoodError("rearranges channels")
    parts = scaled(x.parts, shape[x.dim] // before[x.dim])
    constant, known = given[x.dim]
    if isinstance(known, Size):
        if not _same(p, known.parts, parts):
            raise NotUnderstoodError("reshapes with another tensor's channel count")
    elif constant != -1:
        raise NotUnderstoodError("has the channel count written as a constant; write -1 or x.size(1)")
    return Channels(x.dim, parts)


def _given_sizes(p: Propagation, node: fx.Node, first: Any) -> list[tuple[Any, Known]]:
    """(the size as written, what is known of it) of each requested dimension."""
    if isinstance(first, (tuple, list)):
        requested: Any = first
    elif isinstance(first, fx.Node) and isinstance(first.meta.get("value"), tuple):
        known = p.known(first)
        values = first.meta["value"]
        return list(zip([None] * len(values), known if isinstance(known, tuple) else [None] * len(values), strict=True))
    else:
        requested = node.args[1:]
    return [(size, p.known(size)) for size in requested]


def _same(p: Propagation, one: Parts, other: Parts) -> bool:
    def key(parts: Parts) -> list[tuple[int | None, int]]:
        return [(None if part.unit is None else p.units.find(part.unit), part.channels) for part in parts]

    return key(one) == key(other)


def expand(p: Propagation, node: fx.Node) -> Known:
    """``x.expand(-1, -1, h, w)``."""
    x, shape = p.channels(node.args[0]), shape_of(node)
    given = _given_sizes(p, node, argument(node, 1, "size"))
    dim = x.dim + len(shape) - len(shape_of(node.args[0])) if x is not None else None
    for d, (constant, known) in enumerate(given):
        if isinstance(known, Size) and (d != dim or x is None or not _same(p, known.parts, x.parts)):
            raise NotUnderstoodError("expands to another tensor's channel count")
        if d == dim and known is None and constant != -1:
            raise NotUnderstoodError("has the channel count written as a constant; write -1 or x.size(1)")
    return None if x is None or dim is None else Channels(dim, x.parts)


def permute(p: Propagation, node: fx.Node) -> Known:
    """``x.permute(0, 2, 3, 1)``."""
    x, first = p.channels(node.args[0]), argument(node, 1, "dims")
    order: Any = first if isinstance(first, (tuple, list)) else node.args[1:]
    return None if x is None else Channels([d % len(order) for d in order].index(x.dim), x.parts)


def transpose(p: Propagation, node: fx.Node) -> Known:
    """``x.transpose(1, 2)``."""
    x, ndim = p.channels(node.args[0]), len(shape_of(node))
    if x is None:
        return None
    one, other = (argument(node, i, f"dim{i - 1}") % ndim for i in (1, 2))
    return Channels({one: other, other: one}.get(x.dim, x.dim), x.parts)


def squeeze(p: Propagation, node: fx.Node) -> Known:
    """``x.squeeze(-1)``; without a dimension, all of size 1 but the batch go."""
    x, dims, shape = p.channels(node.args[0]), argument(node, 1, "dim"), shape_of(node.args[0])
    if x is None:
        return None
    if dims is None and shape[0] == 1:
        raise NotUnderstoodError("squeezes every dimension of size 1, the batch too; name the dimensions")
    asked = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % len(shape) for d in asked if shape[d] == 1}
    return None if x.dim in gone else Channels(x.dim - sum(d < x.dim for d in gone), x.parts)


def unsqueeze(p: Propagation, node: fx.Node) -> Known:
    """``x.unsqueeze(-1)``."""
    x = p.channels(node.args[0])
    dim = argument(node, 1, "dim") % len(shape_of(node))
    return None if x is None else Channels(x.dim + (dim <= x.dim), x.parts)


NAMED: dict[str, Rule] = {
    "size": size,
    "flatten": no_counts(flatten),
    "expand": expand,
    **dict.fromkeys(("view", "reshape"), view),
    **dict.fromkeys(("dim", "ndimension"), no_channels),
    "permute": no_counts(permute),
    **dict.fromkeys(("transpose", "swapaxes"), no_counts(transpose)),
    "squeeze": no_counts(squeeze),
    "unsqueeze": no_counts(unsqueeze),
}
