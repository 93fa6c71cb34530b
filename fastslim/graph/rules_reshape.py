"""Rules for operations that join and divide dimensions: view, reshape, flatten, unflatten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from fastslim.graph.known import Dim, Known, Layout, argument, is_tensor, name_of, product, shape_of
from fastslim.graph.parts import NotUnderstoodError, Part, Parts, scaled
from fastslim.graph.propagate import Propagation, Rule
from fastslim.graph.reshape_hints import CONSTANT, FOLLOWS, FULL_SIZE, size_hints, taken_apart

MOST_BLOCKS = 1024


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
    hints = size_hints(p, node, paths, p.dims(x), len(shape))
    unbound = taken_apart(node)
    hints = [min(hint, CONSTANT) if i in unbound else hint for i, hint in enumerate(hints)]
    dims = _shuffled_groups(p, node) or _regroup(p, p.dims(x), shape_of(x), shape, hints, unbound)
    for path, dim, size in zip(paths, dims, shape, strict=False):
        p.want(node, path, dim, size)
    if _is_shuffle(node):
        dims = tuple(dim if dim is None else shuffled(p, dim, 1) for dim in dims)
    return Layout(dims)


def in_groups(p: Propagation, parts: Dim) -> bool:
    """Whether widths come in groups of channels that stay together, as behind a grouped convolution."""
    return parts is not None and any(
        part.unit is not None and p.units[part.unit].granularity * part.channels > p.units[part.unit].channels
        for part in p.units.resolve(parts)
    )


def _shuffled_groups(p: Propagation, node: fx.Node) -> tuple[Dim, ...] | None:
    """The first view of a shuffle behind a grouped convolution: whole groups are active, so channels are counted."""
    before, shape, dims = shape_of(node.args[0]), shape_of(node), p.dims(node.args[0])
    place = next((d for d, dim in enumerate(dims) if dim is not None), None)
    if place is None or len(shape) != len(before) + 1 or not in_groups(p, dims[place]):
        return None
    groups = shape[place]
    if (*before[:place], groups, before[place] // groups, *before[place + 1 :]) != shape:
        return None
    pending, ends = list(node.users), []
    while pending:
        user = pending.pop()
        if name_of(user) in ("contiguous", "transpose", "permute", "swapaxes"):
            pending += user.users
        else:
            ends.append(user)
    if not ends or not all(name_of(end) in ("view", "reshape", "flatten") and _is_shuffle(end) for end in ends):
        return None
    inner = tuple(Part(part.unit, part.channels, True) for part in p.units.divided(dims[place], groups))
    return (*dims[:place], None, inner, *dims[place + 1 :])


def _is_shuffle(node: fx.Node) -> bool:
    """``x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)``."""
    source, swapped = node.args[0], False
    while isinstance(source, fx.Node) and name_of(source) in ("contiguous", "transpose", "permute", "swapaxes"):
        swapped = swapped or name_of(source) != "contiguous"
        source = source.args[0]
    if not swapped or not isinstance(source, fx.Node) or name_of(source) not in ("view", "reshape"):
        return False
    return shape_of(source.args[0]) == shape_of(node) and len(shape_of(source)) > len(shape_of(node))


def _regroup(
    p: Propagation,
    dims: Sequence[Dim],
    before: Sequence[int],
    after: Sequence[int],
    hints: Sequence[int],
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
    dims = _one_slimmable(p, dims)
    for dim, size in zip(reversed(dims), reversed(sizes), strict=True):
        if size == 1:
            continue
        if result is None:
            if dim is not None:
                result = scaled(dim, inner)
        elif dim is not None:
            raise NotUnderstoodError("joins two dimensions that can both be slimmed")
        elif size * len(result) > MOST_BLOCKS:
            raise NotUnderstoodError("joins channels with too many positions before them")
        else:
            result = result * size
        inner *= size
    return result


def _one_slimmable(p: Propagation, dims: Sequence[Dim]) -> Sequence[Dim]:
    """Of several dimensions that are to be joined, those that no layer produces stay full; at least one is left."""
    if sum(dim is not None for dim in dims) < 2:
        return dims
    loose = [dim is not None and not p.units.is_produced(dim) for dim in dims]
    if all(own or dim is None for own, dim in zip(loose, dims, strict=True)):
        loose[next(i for i, dim in enumerate(dims) if dim is not None)] = False
    for dim, own in zip(dims, loose, strict=True):
        if own:
            p.keep_full(dim, "is joined with channels")
    return [None if own else dim for dim, own in zip(dims, loose, strict=True)]


def divide_dim(p: Propagation, flat: Dim, sizes: Sequence[int], hints: Sequence[int], apart: set[int]) -> list[Dim]:
    """One dimension as several; one of them holds the channels, the others stay as they are."""
    if flat is None:
        return [None] * len(sizes)
    candidates = [i for i, size in enumerate(sizes) if size > 1]
    if not candidates:
        return [None] * len(sizes)

    def leaves_no_choice(i: int) -> bool:
        return product(sizes[:i]) == 1 and not p.units.can_divide(flat, product(sizes[i + 1 :]))

    # The dimension whose size follows the width; behind it those that leave more than one width, and are not taken
    # apart; the first of them.
    order = sorted(candidates, key=lambda i: (-hints[i], leaves_no_choice(i), i in apart, i))
    reason: NotUnderstoodError | None = None
    for choice in order:
        try:
            result: list[Dim] = [None] * len(sizes)
            result[choice] = one_dim(p, flat, product(sizes[:choice]), sizes[choice], product(sizes[choice + 1 :]))
            return result
        except NotUnderstoodError as error:
            reason = reason or error
    raise reason or NotUnderstoodError("divides the channels")


def one_dim(p: Propagation, flat: Parts, outer: int, size: int, inner: int) -> Parts:
    """The channels as the middle one of three dimensions: the `outer` blocks change together."""
    if outer == 1:
        return p.units.divided(flat, inner)
    if outer > MOST_BLOCKS:
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
    hints = size_hints(p, node, paths, (before[dim],), count)
    apart = {d - dim for d in taken_apart(node)}
    divided = divide_dim(p, before[dim], shape[dim : dim + count], hints, apart)
    for path, parts, size in zip(paths, divided, shape[dim : dim + count], strict=False):
        p.want(node, path, parts, size)
    return Layout((*before[:dim], *divided, *before[dim + 1 :]))


def reshape_as(p: Propagation, node: fx.Node) -> Known:
    """``x.view_as(other)``."""
    x, other = node.args[0], node.args[1]
    shape = shape_of(other)
    hints = [FULL_SIZE if dim is None else FOLLOWS for dim in p.dims(other)]
    dims = _regroup(p, p.dims(x), shape_of(x), shape, hints, set())
    return Layout(tuple(p.tie(a, b, n) for a, b, n in zip(dims, p.dims(other), shape, strict=True)))


def shuffled(p: Propagation, parts: Parts, factor: int) -> Parts:
    """Every entry `factor` times in a row, from different places: from here on channels are counted."""
    p.units.count_only(parts)
    return tuple(Part(part.unit, part.channels * factor, True) for part in parts)


NAMED: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape"), reshape),
    **dict.fromkeys(("view_as", "reshape_as"), reshape_as),
    **dict.fromkeys(("flatten", "ravel"), flatten),
    "unflatten": unflatten,
}
MODULES: dict[type[nn.Module], Rule] = {
    nn.Flatten: flatten_module,
    nn.Unflatten: unflatten_module,
}
