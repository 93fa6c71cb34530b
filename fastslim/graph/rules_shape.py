"""Rules for operations that rearrange, repeat, add and drop dimensions, and for new tensors."""

from __future__ import annotations

from typing import Any

from torch import fx

from fastslim.graph.known import Dim, Known, Layout, Size, argument, is_tensor, number, shape_of
from fastslim.graph.parts import NotUnderstoodError, scaled, total
from fastslim.graph.propagate import Propagation, Rule
from fastslim.graph.rules_reshape import MOST_BLOCKS


def expand(p: Propagation, node: fx.Node) -> Known:
    """``x.expand(-1, -1, h, w)``: new entries follow what they meet."""
    x, shape = node.args[0], shape_of(node)
    given = argument(node, 1, "size")
    paths: list[tuple] = (
        [(1, i) for i in range(len(given))]
        if isinstance(given, (tuple, list))
        else [(i,) for i in range(1, len(node.args))]
    )
    if len(paths) != len(shape):
        raise NotUnderstoodError("expands to a computed shape")
    offset = len(shape) - len(shape_of(x))
    dims: list[Dim] = []
    for d, size in enumerate(shape):
        own = d - offset
        if own >= 0 and shape_of(x)[own] == size and size > 1:
            dim = p.dims(x)[own]
        else:
            dim = sized(p, node, paths[d], size)
        p.want(node, paths[d], dim, size)
        dims.append(dim)
    return Layout(tuple(dims))


def sized(p: Propagation, node: fx.Node, path: tuple, size: int) -> Dim:
    """A new dimension of a given size: a unit's where the size is, else it follows what it meets."""
    value: Any = node.args[path[0]] if isinstance(path[0], int) else node.kwargs[path[0]]
    for key in path[1:]:
        value = value[key]
    known = p.known.get(value) if isinstance(value, fx.Node) else None
    if isinstance(known, Size):
        if known.exact and known.divisor == 1 and total(known.parts) == size:
            return known.parts
        return (p.units.new(size),) if size > 1 and known.exact else None
    return (p.units.new(size),) if size > 1 and not isinstance(value, fx.Node) else None


def expand_as(p: Propagation, node: fx.Node) -> Known:
    """``x.expand_as(other)``."""
    from fastslim.graph.rules_elementwise import broadcast_dims

    return Layout(broadcast_dims(p, [n for n in node.all_input_nodes if is_tensor(n)], shape_of(node)))


def repeat(p: Propagation, node: fx.Node) -> Known:
    """``x.repeat(1, 2, 1)`` and ``tile``: the entries several times over."""
    x, shape = node.args[0], shape_of(node)
    offset = len(shape) - len(shape_of(x))
    dims: list[Dim] = []
    for d, size in enumerate(shape):
        own = d - offset
        before = shape_of(x)[own] if own >= 0 else 1
        dim = p.dims(x)[own] if own >= 0 else None
        if dim is None and before == 1 and size > 1:
            given = argument(node, 1, "repeats", node.kwargs.get("dims"))
            path = (1, d) if isinstance(given, (tuple, list)) else (1 + d,)
            dim = sized(p, node, path, size) if len(shape) >= len(shape_of(x)) else None
            p.want(node, path, dim, size)
        elif dim is not None and size != before:
            if (size // before) * len(dim) > MOST_BLOCKS:
                raise NotUnderstoodError("repeats the channels too often")
            dim = dim * (size // before)
        dims.append(dim)
    return Layout(tuple(dims))


def repeat_interleave(p: Propagation, node: fx.Node) -> Known:
    """Every entry several times in a row."""
    x, times, dim = node.args[0], argument(node, 1, "repeats"), argument(node, 2, "dim")
    if dim is None:
        raise NotUnderstoodError("repeats every entry, without a dimension")
    dims = list(p.dims(x))
    parts = dims[dim]
    if parts is not None:
        if not isinstance(times, int):
            raise NotUnderstoodError("repeats channels by a tensor or a computed number")
        dims[dim] = scaled(parts, times)
    return Layout(tuple(dims))


def permute(p: Propagation, node: fx.Node) -> Known:
    """``x.permute(0, 2, 3, 1)``."""
    given = argument(node, 1, "dims")
    order: Any = given if isinstance(given, (tuple, list)) else node.args[1:]
    dims = p.dims(node.args[0])
    return Layout(tuple(dims[d] for d in order))


def transpose(p: Propagation, node: fx.Node) -> Known:
    """``x.transpose(1, 2)``."""
    dims = list(p.dims(node.args[0]))
    one, other = argument(node, 1, "dim0"), argument(node, 2, "dim1")
    dims[one], dims[other] = dims[other], dims[one]
    return Layout(tuple(dims))


def transpose_last(p: Propagation, node: fx.Node) -> Known:
    """``x.T``, ``x.mT``, ``x.t()``."""
    dims = p.dims(node.args[0])
    return Layout((*dims[:-2], *dims[-2:][::-1]))


def movedim(p: Propagation, node: fx.Node) -> Known:
    """``x.movedim(source, destination)``."""
    dims = p.dims(node.args[0])
    sources, targets = argument(node, 1, "source"), argument(node, 2, "destination")
    sources = [sources] if isinstance(sources, int) else list(sources)
    targets = [targets] if isinstance(targets, int) else list(targets)
    sources, targets = ([d % len(dims) for d in ds] for ds in (sources, targets))
    rest = iter(d for d in range(len(dims)) if d not in sources)
    placed = dict(zip(targets, sources, strict=True))
    return Layout(tuple(dims[placed[d] if d in placed else next(rest)] for d in range(len(dims))))


def squeeze(p: Propagation, node: fx.Node) -> Known:
    """``x.squeeze(-1)``; without a dimension, all of size 1 go."""
    x, given = node.args[0], argument(node, 1, "dim")
    shape = shape_of(x)
    asked = range(len(shape)) if given is None else [given] if isinstance(given, int) else given
    gone = {d % len(shape) for d in asked if shape and shape[d] == 1}
    return Layout(tuple(dim for d, dim in enumerate(p.dims(x)) if d not in gone))


def unsqueeze(p: Propagation, node: fx.Node) -> Known:
    """``x.unsqueeze(-1)``."""
    dim = argument(node, 1, "dim") % len(shape_of(node))
    dims = p.dims(node.args[0])
    return Layout((*dims[:dim], None, *dims[dim:]))


def at_least(p: Propagation, node: fx.Node) -> Known:
    """``torch.atleast_2d`` and the like on a tensor that has the dimensions already."""
    return Layout(p.dims(node.args[0])) if shape_of(node) == shape_of(node.args[0]) else None


def factory(first: int) -> Rule:
    """A new tensor: its dimensions are the units' whose sizes it was given, or follow what they meet."""

    def rule(p: Propagation, node: fx.Node) -> Known:
        given = argument(node, first, "size")
        if isinstance(given, (tuple, list)):
            key: Any = first if len(node.args) > first else "size"
            paths: list[tuple] = [(key, i) for i in range(len(given))]
        else:
            paths = [(i,) for i in range(first, len(node.args))]
        shape = shape_of(node)
        if len(paths) != len(shape):
            return None
        dims = [sized(p, node, path, size) for path, size in zip(paths, shape, strict=True)]
        for path, dim, size in zip(paths, dims, shape, strict=True):
            p.want(node, path, dim, size)
        return Layout(tuple(dims))

    return rule


def arange(p: Propagation, node: fx.Node) -> Known:
    """``torch.arange(n)``: the first numbers."""
    if len(node.args) != 1:
        return None
    dim = sized(p, node, (0,), shape_of(node)[0]) if len(shape_of(node)) == 1 else None
    if dim is not None and number(node.args[0]) == shape_of(node)[0]:
        p.want(node, (0,), dim, shape_of(node)[0])
        return Layout((dim,))
    return None


NAMED: dict[str, Rule] = {
    "expand": expand,
    "expand_as": expand_as,
    **dict.fromkeys(("broadcast_to",), expand),
    **dict.fromkeys(("repeat", "tile"), repeat),
    "repeat_interleave": repeat_interleave,
    "permute": permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "transpose_"), transpose),
    **dict.fromkeys(("t", "T", "mT", "H", "mH"), transpose_last),
    **dict.fromkeys(("movedim", "moveaxis"), movedim),
    **dict.fromkeys(("squeeze", "squeeze_"), squeeze),
    **dict.fromkeys(("unsqueeze", "unsqueeze_"), unsqueeze),
    **dict.fromkeys(("atleast_1d", "atleast_2d", "atleast_3d"), at_least),
    **dict.fromkeys(("zeros", "ones", "empty", "rand", "randn"), factory(0)),
    "full": factory(0),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full"), factory(1)),
    "arange": arange,
}
