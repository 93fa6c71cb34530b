"""Which of the dimensions that a reshape makes of channels keeps them: how sizes are written, and what comes after."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from fastslim.graph.known import Dim, Size, argument, name_of, shape_of
from fastslim.graph.propagate import Propagation

# How likely the channels are to stay in a dimension, from how its size is written.
FULL_SIZE, CONSTANT, COMPUTED, FOLLOWS = range(4)
_PRODUCTS = frozenset("matmul bmm einsum scaled_dot_product_attention baddbmm __matmul__".split())
_ON_THE_WAY = frozenset(
    "permute transpose swapaxes movedim contiguous unbind chunk split tensor_split getitem mul div add sub neg cat "
    "softmax normalize to float type_as squeeze unsqueeze repeat_interleave expand reshape view flatten".split()
)


def size_hints(p: Propagation, node: fx.Node, paths: Sequence[tuple], dims: Sequence[Dim], count: int) -> list[int]:
    """How likely the channels are to stay in each dimension; heads rather than the entries of a head."""
    hints = [_depends(p, node, path, dims) for path in paths] or [CONSTANT] * count
    return [min(hint, CONSTANT) for hint in hints] if _feeds_product(node) else hints


def _feeds_product(node: fx.Node) -> bool:
    """Whether the pieces go into a matrix product or attention, as heads do."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            name = name_of(user)
            if name in _PRODUCTS:
                return True
            if name in _ON_THE_WAY and user not in seen and len(seen) < 64:
                seen.add(user)
                pending.append(user)
    return False


def _depends(p: Propagation, node: fx.Node, path: tuple, dims: Sequence[Dim]) -> int:
    """How a size is written: -1 or taken from these very channels; from others; a constant; a full size."""
    value: Any = node.args[path[0]] if isinstance(path[0], int) else node.kwargs[path[0]]
    for key in path[1:]:
        value = value[key]
    if not isinstance(value, fx.Node):
        return FOLLOWS if value == -1 else CONSTANT
    known = p.known.get(value)
    if not isinstance(known, Size):
        return FULL_SIZE
    own = {part.unit for dim in dims if dim is not None for part in dim}
    return FOLLOWS if own & {part.unit for part in p.units.resolve(known.parts)} else COMPUTED


def taken_apart(node: fx.Node) -> set[int]:
    """Dimensions of a reshaped tensor that are then taken apart: ``qkv.permute(2, 0, 3, 1, 4).unbind(0)``."""
    found: set[int] = set()
    ndim = len(shape_of(node))
    pending: list[tuple[fx.Node, list[int]]] = [(node, list(range(ndim)))]
    while pending:
        source, order = pending.pop()
        for user in source.users:
            name = name_of(user)
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
            elif name in ("chunk", "split", "tensor_split"):
                found.add(order[argument(user, 2, "dim", 0)])
            elif user.target is operator.getitem:
                index = user.args[1] if isinstance(user.args[1], tuple) else (user.args[1],)
                for position, i in enumerate(index):
                    if i is Ellipsis or i is None:
                        break
                    if isinstance(i, int):
                        found.add(order[position])
    return found
