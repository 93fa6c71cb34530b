"""Rules for taking pieces of a tensor: chunk, split, slices, indices, and writing into them."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from fastslim.graph.known import Dim, Known, Layout, argument, is_tensor, number, shape_of
from fastslim.graph.parts import NotUnderstoodError, Parts, total
from fastslim.graph.propagate import Propagation, Rule
from fastslim.graph.rules_elementwise import broadcast_dims


def getitem(p: Propagation, node: fx.Node) -> Known:
    """An element of a tuple, or part of a tensor."""
    source: Any = node.args[0]
    index = node.args[1]
    if not is_tensor(source):
        known = p.known.get(source)
        if isinstance(known, tuple) and isinstance(index, int):
            return known[index]
        if known is None or isinstance(index, str):
            return None
        raise NotUnderstoodError("takes a computed element of a tuple")
    return Layout(_indexed(p, node, source, index, (1,)))


def _indexed(p: Propagation, node: fx.Node, source: fx.Node, index: Any, path: tuple) -> tuple[Dim, ...]:
    shape, dims = shape_of(source), p.dims(source)
    indices = list(index) if isinstance(index, tuple) else [index]
    paths = [(*path, i) for i in range(len(indices))] if isinstance(index, tuple) else [path]
    taken = sum(_consumes(i) for i in indices)
    if Ellipsis in [i for i in indices if not isinstance(i, fx.Node)]:
        at = next(n for n, i in enumerate(indices) if i is Ellipsis)
    else:
        at = len(indices)
    rest = len(shape) - taken
    indices[at : at + 1] = [slice(None)] * rest
    paths[at : at + 1] = [None] * rest
    result: list[Dim] = []
    tensors = [i for i in indices if is_tensor(i) or isinstance(i, (list, tuple))]
    placed = False
    d = 0
    for i, own in zip(indices, paths, strict=True):
        if i is None:
            result.append(None)
        elif isinstance(i, slice):
            result.append(_slice(p, node, dims[d], shape[d], i, own))
            d += 1
        elif is_tensor(i) or isinstance(i, (list, tuple)):
            for _ in range(_consumes(i)):
                p.keep_full(dims[d], "picks channels by an index")
                d += 1
            if not placed:
                if len(tensors) > 1 and not _side_by_side(indices):
                    raise NotUnderstoodError("indexes with tensors in several places")
                result.extend([None] * _index_dims(tensors))
                placed = True
        else:
            if dims[d] is not None:
                p.keep_full(dims[d], "picks a single channel")
            d += 1
    return tuple(result)


def _consumes(i: Any) -> int:
    """How many dimensions an index takes."""
    if i is None or i is Ellipsis:
        return 0
    if is_tensor(i) and i.meta.get("is_mask", False):
        return len(shape_of(i))
    return 1


def _index_dims(tensors: list[Any]) -> int:
    if any(is_tensor(t) and t.meta.get("is_mask", False) for t in tensors):
        return 1
    return max(len(shape_of(t)) if is_tensor(t) else 1 for t in tensors)


def _side_by_side(indices: list[Any]) -> bool:
    places = [n for n, i in enumerate(indices) if is_tensor(i) or isinstance(i, (list, tuple))]
    return places == list(range(places[0], places[-1] + 1))


def _slice(p: Propagation, node: fx.Node, parts: Dim, size: int, index: slice, path: tuple | None) -> Dim:
    if parts is None or (index.start is None and index.stop is None and index.step in (None, 1)):
        return parts
    start, stop, step = slice(*map(number, (index.start, index.stop, index.step))).indices(size)
    if step != 1:
        p.keep_full(parts, "takes every other channel")
        return None
    if start == 0 and stop == size and not isinstance(index.stop, fx.Node) and (index.stop or size) >= size:
        if isinstance(index.stop, int):  # written as a constant at least as large: nothing is cut at any width
            return parts
    return take(p, node, parts, size, start, stop, index, path)


def take(
    p: Propagation, node: fx.Node, parts: Parts, size: int, start: int, stop: int, index: slice, path: tuple | None
) -> Dim:
    """The channels from `start` to `stop`; where the borders are written as numbers, they follow the widths."""
    borders = [n for n in (start, stop) if 0 < n < size]
    pieces = p.units.cut(parts, borders)
    before = pieces[0] if start > 0 else ()
    taken = pieces[1] if start > 0 else pieces[0]
    for name, given, wanted in (("start", index.start, before), ("stop", index.stop, (*before, *taken))):
        if given is None or path is None:
            continue
        if isinstance(given, int) and given < 0:
            raise NotUnderstoodError("counts channels from the end")
        p.want(node, (*path, name), p.units.resolve(wanted), number(given))
    return p.units.resolve(taken)


def chunk(p: Propagation, node: fx.Node) -> Known:
    """Equal pieces, which change together."""
    count, dim = argument(node, 1, "chunks", node.kwargs.get("indices_or_sections")), argument(node, 2, "dim", 0)
    x = node.args[0]
    dims = list(p.dims(x))
    parts, size = dims[dim], shape_of(x)[dim]
    if parts is None:
        return (Layout(tuple(dims)),) * number(count)
    if not isinstance(count, int) or size % count:
        raise NotUnderstoodError(f"divides {size} channels into pieces of different sizes")
    return _pieces(p, dims, dim, [size // count] * count, together=True)


def _pieces(p: Propagation, dims: list[Dim], dim: int, sizes: list[int], together: bool) -> Known:
    parts = dims[dim]
    assert parts is not None
    offsets = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    pieces: list[Dim] = list(p.units.cut(parts, offsets))
    if together:
        p.tie_all(pieces, sizes[0])
    layouts = []
    for piece in pieces:
        dims[dim] = piece
        layouts.append(Layout(tuple(dims)))
    return tuple(p._resolved(layout) for layout in layouts)


def split(p: Propagation, node: fx.Node) -> Known:
    """Pieces of given sizes."""
    given = argument(node, 1, "split_size_or_sections", node.kwargs.get("split_size", node.kwargs.get("split_sizes")))
    dim = argument(node, 2, "dim", 0)
    x = node.args[0]
    dims = list(p.dims(x))
    parts, size = dims[dim], shape_of(x)[dim]
    key: Any = 1 if len(node.args) > 1 else next(k for k in node.kwargs if k.startswith("split_size"))
    if not isinstance(given, (tuple, list)):
        each = number(given)
        if parts is None:
            return (Layout(tuple(dims)),) * math.ceil(size / each)
        if size % each:
            raise NotUnderstoodError(f"divides {size} channels into pieces of different sizes")
        result = _pieces(p, dims, dim, [each] * (size // each), together=True)
        assert isinstance(result, tuple) and isinstance(result[0], Layout)
        p.want(node, (key,), result[0].dims[dim], each)
        return result
    sizes = [number(n) for n in given]
    if parts is None:
        return (Layout(tuple(dims)),) * len(sizes)
    result = _pieces(p, dims, dim, sizes, together=False)
    assert isinstance(result, tuple)
    for i, (layout, n) in enumerate(zip(result, sizes, strict=True)):
        p.want(node, (key, i), layout.dims[dim], n)
    return result


def unbind(p: Propagation, node: fx.Node) -> Known:
    """All entries of one dimension, which stays full."""
    x, dim = node.args[0], argument(node, 1, "dim", 0)
    dims = list(p.dims(x))
    if dims[dim] is not None:
        p.keep_full(dims[dim], "takes the channels apart")
    count = shape_of(x)[dim]
    del dims[dim]
    return (Layout(tuple(dims)),) * count


def narrow(p: Propagation, node: fx.Node) -> Known:
    """``x.narrow(dim, start, length)``."""
    x, dim, start, length = (argument(node, i, n) for i, n in enumerate(("input", "dim", "start", "length")))
    dims = list(p.dims(x))
    if dims[dim] is not None:
        if number(start) != 0:
            raise NotUnderstoodError("takes channels from the middle; write a slice")
        dims[dim] = p.units.cut(dims[dim], [number(length)])[0]
        p.want(node, (3,) if len(node.args) > 3 else ("length",), dims[dim], number(length))
    return Layout(tuple(dims))


def select(p: Propagation, node: fx.Node) -> Known:
    """``x.select(dim, index)``."""
    dims = list(p.dims(node.args[0]))
    dim = argument(node, 1, "dim")
    p.keep_full(dims[dim], "picks a single channel")
    del dims[dim]
    return Layout(tuple(dims))


def index_select(p: Propagation, node: fx.Node) -> Known:
    """``x.index_select(dim, index)``: the indexed dimension stays full."""
    dims = list(p.dims(node.args[0]))
    dim = argument(node, 1, "dim")
    p.keep_full(dims[dim], "picks channels by an index")
    dims[dim] = None
    return Layout(tuple(dims))


def gather(p: Propagation, node: fx.Node) -> Known:
    """``x.gather(dim, index)``: no dimension of x may shrink below what the index asks for."""
    x, index = node.args[0], argument(node, 2, "index")
    for d in (*p.dims(x), *p.dims(index)):
        p.keep_full(d, "picks channels by an index")
    return None


def setitem(p: Propagation, node: fx.Node) -> Known:
    """``x[index] = value``: what is written changes together with what is written to."""
    source, index, value = node.args
    assert isinstance(source, fx.Node)
    region = _indexed(p, node, source, index, (1,))
    if is_tensor(value):
        offset = len(region) - len(shape_of(value))
        if offset < 0:
            raise NotUnderstoodError("writes a tensor of more dimensions")
        for d, (dim, size) in enumerate(zip(p.dims(value), shape_of(value), strict=True)):
            if size > 1:
                p.tie(region[offset + d], dim, size)
    return None


def where(p: Propagation, node: fx.Node) -> Known:
    """Elementwise selection."""
    return Layout(broadcast_dims(p, [n for n in node.all_input_nodes if is_tensor(n)], shape_of(node)))


NAMED: dict[str, Rule] = {
    **dict.fromkeys(("chunk", "tensor_split"), chunk),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split"), split),
    "unbind": unbind,
    "narrow": narrow,
    "select": select,
    "index_select": index_select,
    "gather": gather,
    "setitem": setitem,
    "getitem": getitem,
}
__all__ = ["NAMED", "chunk", "getitem", "total"]
