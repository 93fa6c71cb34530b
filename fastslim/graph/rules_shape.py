"""Rules for operations that rearrange, repeat or take parts of dimensions."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from fastslim.graph.parts import NotUnderstoodError, Part, Parts, scaled, total
from fastslim.graph.propagate import (
    Dim,
    Known,
    Layout,
    Propagation,
    Rule,
    Size,
    argument,
    is_tensor,
    number,
    product,
    shape_of,
)

_MOST_BLOCKS = 1024


def reshape(p: Propagation, node: fx.Node) -> Known:
    """``view`` and ``reshape``: groups of dimensions with the same number of entries are joined and divided."""
    x, shape = node.args[0], shape_of(node)
    given = argument(node, 1, "shape", node.kwargs.get("size"))
    if isinstance(given, (tuple, list)):
        key: Any = 1 if len(node.args) > 1 else ("shape" if "shape" in node.kwargs else "size")
        paths: list[tuple] = [(key, i) for i in range(len(given))]
    elif is_tensor(given):
        paths = []
    else:
        paths = [(i,) for i in range(1, len(node.args))]
    if len(paths) != len(shape):
        paths = []
    hints = [_depends(p, node, path) for path in paths] or [False] * len(shape)
    unbound = _taken_apart(node)
    dims = _regroup(p, p.dims(x), shape_of(x), shape, [h and i not in unbound for i, h in enumerate(hints)], unbound)
    for path, dim, size in zip(paths, dims, shape, strict=False):
        p.want(node, path, dim, size)
    if _is_shuffle(node):
        dims = tuple(dim if dim is None else shuffled(p, dim, 1) for dim in dims)
    return Layout(dims)


def _is_shuffle(node: fx.Node) -> bool:
    """``x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)``."""
    source, swapped = node.args[0], False
    while isinstance(source, fx.Node) and _name(source) in ("contiguous", "transpose", "permute", "swapaxes"):
        swapped = swapped or _name(source) != "contiguous"
        source = source.args[0]
    if not swapped or not isinstance(source, fx.Node) or _name(source) not in ("view", "reshape"):
        return False
    return shape_of(source.args[0]) == shape_of(node) and len(shape_of(source)) > len(shape_of(node))


def _depends(p: Propagation, node: fx.Node, path: tuple) -> bool:
    """Whether a size is written as -1 or computed from a size that can be slimmed."""
    value: Any = node.args[path[0]] if isinstance(path[0], int) else node.kwargs[path[0]]
    for key in path[1:]:
        value = value[key]
    return value == -1 or (isinstance(value, fx.Node) and isinstance(p.known.get(value), Size))


def _taken_apart(node: fx.Node) -> set[int]:
    """Dimensions of a reshaped tensor that are then taken apart: ``qkv.permute(2, 0, 3, 1, 4).unbind(0)``."""
    found: set[int] = set()
    ndim = len(shape_of(node))
    pending: list[tuple[fx.Node, list[int]]] = [(node, list(range(ndim)))]
    while pending:
        source, order = pending.pop()
        for user in source.users:
            name = _name(user)
            if name in ("permute", "transpose", "swapaxes", "movedim", "contiguous") and len(order) < 16:
                if name == "permute":
                    dims: Any = argument(user, 1, "dims")
                    dims = dims if isinstance(dims, (tuple, list)) else user.args[1:]
                    pending.append((user, [order[d] for d in dims]))
                elif name in ("transpose", "swapaxes"):
                    one, other = argument(user, 1, "dim0"), argument(user, 2, "dim1")
                    swapped = list(order)
                    swapped[one], swapped[other] = order[other], order[one]
                    pending.append((user, swapped))
                elif name == "contiguous":
                    pending.append((user, order))
            elif name == "unbind":
                found.add(order[argument(user, 1, "dim", 0)])
            elif name == "chunk":
                found.add(order[argument(user, 2, "dim", 0)])
            elif user.target is operator.getitem:
                index = user.args[1] if isinstance(user.args[1], tuple) else (user.args[1],)
                for position, i in enumerate(index):
                    if i is Ellipsis or i is None:
                        break
                    if isinstance(i, int):
                        found.add(order[position])
    return found


def _name(node: fx.Node) -> str:
    return node.target if node.op == "call_method" else getattr(node.target, "__name__", "")


def _regroup(
    p: Propagation,
    dims: Sequence[Dim],
    before: Sequence[int],
    after: Sequence[int],
    hints: Sequence[bool],
    apart: set[int],
) -> tuple[Dim, ...]:
    result: list[Dim] = [None] * len(after)
    if 0 in before or 0 in after:
        raise NotUnderstoodError("reshapes an empty tensor")
    i = j = 0
    while i < len(before) or j < len(after):
        first_i, first_j = i, j
        left = before[i] if i < len(before) else 1
        right = after[j] if j < len(after) else 1
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while left != right:
            if left < right:
                left *= before[i]
                i += 1
            else:
                right *= after[j]
                j += 1
        if all(dim is None for dim in dims[first_i:i]):
            continue
        flat = flatten_dims(p, dims[first_i:i], before[first_i:i])
        own = {d - first_j for d in apart if first_j <= d < j}
        result[first_j:j] = divide_dim(p, flat, after[first_j:j], hints[first_j:j], own)
    return tuple(result)


def flatten_dims(p: Propagation, dims: Sequence[Dim], sizes: Sequence[int]) -> Dim:
    """Several dimensions as one, the last running fastest."""
    result: Dim = None
    inner = 1
    for dim, size in zip(reversed(dims), reversed(sizes), strict=True):
        if size == 1:
            continue
        if result is None:
            if dim is not None:
                result = scaled(dim, inner)
        elif dim is not None:
            raise NotUnderstoodError("joins two dimensions that can both be slimmed")
        elif size * len(result) > _MOST_BLOCKS:
            raise NotUnderstoodError("joins channels with too many positions before them")
        else:
            result = result * size
        inner *= size
    return result


def divide_dim(p: Propagation, flat: Dim, sizes: Sequence[int], hints: Sequence[bool], apart: set[int]) -> list[Dim]:
    """One dimension as several; one of them holds the channels, the others stay as they are."""
    if flat is None:
        return [None] * len(sizes)
    candidates = [i for i, size in enumerate(sizes) if size > 1]
    if not candidates:
        return [None] * len(sizes)
    # The dimension whose size follows the width; behind it those that are not taken apart; the first of them.
    order = sorted(candidates, key=lambda i: (not hints[i], i in apart, i))
    if sum(hints[i] for i in candidates) > 1:
        order = sorted(candidates, key=lambda i: (i in apart, i))
    reason: NotUnderstoodError | None = None
    for choice in order:
        try:
            result: list[Dim] = [None] * len(sizes)
            result[choice] = _one_dim(p, flat, product(sizes[:choice]), sizes[choice], product(sizes[choice + 1 :]))
            return result
        except NotUnderstoodError as error:
            reason = reason or error
    raise reason or NotUnderstoodError("divides the channels")


def _one_dim(p: Propagation, flat: Parts, outer: int, size: int, inner: int) -> Parts:
    if outer == 1:
        return p.units.divided(flat, inner)
    if outer > _MOST_BLOCKS:
        raise NotUnderstoodError("divides the channels into too many blocks")
    blocks = p.units.cut(flat, [size * inner * i for i in range(1, outer)])
    tied = blocks[0]
    for block in blocks[1:]:
        tied = p.tie(tied, block, size * inner) or tied
    return p.units.divided(p.units.resolve(tied), inner)


def flatten(p: Propagation, node: fx.Node) -> Known:
    """``torch.flatten(x, start_dim, end_dim)``."""
    return _flattened(p, node, argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1))


def flatten_module(p: Propagation, node: fx.Node) -> Known:
    """``nn.Flatten``."""
    module: Any = p.module(node)
    return _flattened(p, node, module.start_dim, module.end_dim)


def _flattened(p: Propagation, node: fx.Node, start: int, end: int) -> Known:
    x = node.args[0] if node.args else node.kwargs["input"]
    shape, dims = shape_of(x), p.dims(x)
    if not shape:
        return None
    start, end = start % len(shape), end % len(shape)
    return Layout((*dims[:start], flatten_dims(p, dims[start : end + 1], shape[start : end + 1]), *dims[end + 1 :]))


def unflatten(p: Propagation, node: fx.Node) -> Known:
    """``x.unflatten(dim, sizes)``."""
    dim, sizes = argument(node, 1, "dim") % len(shape_of(node.args[0])), argument(node, 2, "sizes")
    return _unflattened(p, node, dim, [(2, i) for i in range(len(sizes))] if len(node.args) > 2 else [])


def unflatten_module(p: Propagation, node: fx.Node) -> Known:
    """``nn.Unflatten``: its sizes are fixed, so what it divides stays full."""
    module: Any = p.module(node)
    p.keep_full(p.dims(node.args[0])[module.dim], "has the sizes it divides into written as constants")
    return None


def _unflattened(p: Propagation, node: fx.Node, dim: int, paths: list[tuple]) -> Known:
    x, shape = node.args[0], shape_of(node)
    before = p.dims(x)
    count = len(shape) - len(before) + 1
    hints = [_depends(p, node, path) for path in paths] or [False] * count
    apart = {d - dim for d in _taken_apart(node)}
    divided = divide_dim(p, before[dim], shape[dim : dim + count], hints, apart)
    for path, parts, size in zip(paths, divided, shape[dim : dim + count], strict=False):
        p.want(node, path, parts, size)
    return Layout((*before[:dim], *divided, *before[dim + 1 :]))


def reshape_as(p: Propagation, node: fx.Node) -> Known:
    """``x.view_as(other)``."""
    x, other = node.args[0], node.args[1]
    shape = shape_of(other)
    hints = [dim is not None for dim in p.dims(other)]
    dims = _regroup(p, p.dims(x), shape_of(x), shape, hints, set())
    return Layout(tuple(p.tie(a, b, n) for a, b, n in zip(dims, p.dims(other), shape, strict=True)))


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
        return (p.units.new(size),) if size > 1 else None
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
            if (size // before) * len(dim) > _MOST_BLOCKS:
                raise NotUnderstoodError("repeats the channels too often")
            dim = dim * (size // before)
        dims.append(dim)
    return Layout(tuple(dims))


def repeat_interleave(p: Propagation, node: fx.Node) -> Known:
    """Every entry several times in a row."""
    x, times, dim = node.args[0], argument(node, 1, "repeats"), argument(node, 2, "dim")
    if dim is None or not isinstance(times, int):
        raise NotUnderstoodError("repeats by a tensor, or without a dimension")
    dims = list(p.dims(x))
    if dims[dim] is not None:
        dims[dim] = scaled(dims[dim], times)
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


def channel_shuffle(p: Propagation, node: fx.Node) -> Known:
    """The groups' channels in turn: equal shares of the groups stay together."""
    if node.op == "call_module":
        groups = p.module(node).groups  # type: ignore[union-attr]
    else:
        groups = argument(node, 1, "groups")
    dims = list(p.dims(node.args[0]))
    if dims[1] is not None:
        inner = _one_dim(p, dims[1], groups, total(dims[1]) // groups, 1)
        dims[1] = shuffled(p, inner, groups)
    return Layout(tuple(dims))


def shuffled(p: Propagation, parts: Parts, factor: int) -> Parts:
    """Every entry `factor` times in a row, from different places: from here on channels are counted."""
    p.units.count_only(parts)
    return tuple(Part(part.unit, part.channels * factor, True) for part in parts)


def pixel_shuffle(p: Propagation, node: fx.Node) -> Known:
    """R * r channels become r x r pixels of one."""
    factor = p.module(node).upscale_factor if node.op == "call_module" else argument(node, 1, "upscale_factor")  # type: ignore[union-attr]
    dims = list(p.dims(node.args[0]))
    if dims[-3] is not None:
        dims[-3] = p.units.divided(dims[-3], factor * factor)
    return Layout(tuple(dims))


def pixel_unshuffle(p: Propagation, node: fx.Node) -> Known:
    """R x r pixels become r * r channels."""
    factor = p.module(node).downscale_factor if node.op == "call_module" else argument(node, 1, "downscale_factor")  # type: ignore[union-attr]
    dims = list(p.dims(node.args[0]))
    if dims[-3] is not None:
        dims[-3] = scaled(dims[-3], factor * factor)
    return Layout(tuple(dims))


def pooling(spatial: int) -> Rule:
    """Works inside each channel on the last `spatial` dimensions, which stay full."""

    def rule(p: Propagation, node: fx.Node) -> Known:
        x = node.args[0] if node.args else node.kwargs["input"]
        count = spatial or len(shape_of(x)) - 2
        dims = list(p.dims(x))
        for d in range(len(dims) - count, len(dims)):
            p.keep_full(dims[d], "works across the channels")
            dims[d] = None
        layout = Layout(tuple(dims))
        return layout if is_tensor(node) else (layout, layout)

    return rule


def pad(p: Propagation, node: fx.Node) -> Known:
    """Padding: a dimension that grows stays full."""
    x = node.args[0] if node.args else node.kwargs["input"]
    dims = list(p.dims(x))
    for d, (before, after) in enumerate(zip(shape_of(x), shape_of(node), strict=True)):
        if before == after:
            continue
        if dims[d] is None:
            continue
        amounts: Any = argument(node, 1, "pad")
        place = 2 * (len(dims) - 1 - d)
        left, right = (number(n) for n in amounts[place : place + 2])
        mode = argument(node, 2, "mode", "constant")
        if mode != "constant" or left < 0 or right < 0:
            p.keep_full(dims[d], "pads or crops the channels")
            dims[d] = None
            continue
        sides = [(Part(None, n),) if n else () for n in (left, right)]
        dims[d] = (*sides[0], *(dims[d] or ()), *sides[1])
    return Layout(tuple(dims))


def unfold(p: Propagation, node: fx.Node) -> Known:
    """``F.unfold``: (N, C, H, W) -> (N, C * kernel, L)."""
    if len(shape_of(node)) != 3:
        raise NotUnderstoodError("unfolds without a batch dimension, or along one dimension")
    channels, rows = shape_of(node.args[0])[1], shape_of(node)[1]
    dims = p.dims(node.args[0])
    return Layout((dims[0], None if dims[1] is None else scaled(dims[1], rows // channels), None))


def tensor_unfold(p: Propagation, node: fx.Node) -> Known:
    """``x.unfold(dim, size, step)``: windows along one dimension, in a new last one."""
    dims = list(p.dims(node.args[0]))
    dim = argument(node, 1, "dimension")
    p.keep_full(dims[dim], "takes windows of the channels")
    dims[dim] = None
    return Layout((*dims, None))


def fold(p: Propagation, node: fx.Node) -> Known:
    """``F.fold``: (N, C * kernel, L) -> (N, C, H, W)."""
    if len(shape_of(node)) != 4:
        raise NotUnderstoodError("folds without a batch dimension")
    rows, channels = shape_of(node.args[0])[1], shape_of(node)[1]
    dims = p.dims(node.args[0])
    return Layout((dims[0], None if dims[1] is None else p.units.divided(dims[1], rows // channels), None, None))


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


def view_dims(p: Propagation, node: fx.Node) -> Known:
    """Reinterprets the last dimension (complex numbers): that one stays full."""
    dims = list(p.dims(node.args[0]))
    if dims:
        p.keep_full(dims[-1], "reads pairs of channels as complex numbers")
    out = len(shape_of(node))
    return Layout((*dims[: out - 1], None) if out <= len(dims) else (*dims[:-1], None, None))


def glu(p: Propagation, node: fx.Node) -> Known:
    """``a * sigmoid(b)`` of the two halves."""
    dim = p.module(node).dim if node.op == "call_module" else argument(node, 1, "dim", -1)  # type: ignore[union-attr]
    dims = list(p.dims(node.args[0]))
    parts = dims[dim]
    if parts is not None:
        dims[dim] = _one_dim(p, parts, 2, math.ceil(total(parts) / 2), 1)
    return Layout(tuple(dims))


_POOLS = (
    "max_pool{} avg_pool{} adaptive_avg_pool{} adaptive_max_pool{} lp_pool{} max_unpool{} max_pool{}_with_indices "
    "adaptive_max_pool{}_with_indices fractional_max_pool{}"
).split()
NAMED: dict[str, Rule] = {
    **{pool.format(f"{n}d"): pooling(n) for pool in _POOLS for n in (1, 2, 3)},
    **dict.fromkeys(("interpolate", "upsample", "upsample_bilinear", "upsample_nearest", "grid_sample"), pooling(0)),
    **dict.fromkeys(("view", "reshape"), reshape),
    **dict.fromkeys(("view_as", "reshape_as"), reshape_as),
    **dict.fromkeys(("flatten", "ravel"), flatten),
    "unflatten": unflatten,
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
    "channel_shuffle": channel_shuffle,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "pad": pad,
    "unfold": unfold,
    "fold": fold,
    **dict.fromkeys(("zeros", "ones", "empty", "rand", "randn"), factory(0)),
    "full": factory(0),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full"), factory(1)),
    "arange": arange,
    **dict.fromkeys(("view_as_real", "view_as_complex", "rfft", "irfft", "fft"), view_dims),
    "glu": glu,
}
MODULES: dict[type[nn.Module], Rule] = {
    nn.Flatten: flatten_module,
    nn.Unflatten: unflatten_module,
    nn.PixelShuffle: pixel_shuffle,
    nn.PixelUnshuffle: pixel_unshuffle,
    nn.ChannelShuffle: channel_shuffle,
    nn.Unfold: unfold,
    nn.Fold: fold,
    nn.GLU: glu,
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), pooling(0)),
}
