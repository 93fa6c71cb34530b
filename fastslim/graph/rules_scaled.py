"""Sums over channels that are scaled by a number made of their count: ``q @ k * d ** -0.5``, ``x.sum(1) / n``."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import fx

from fastslim.graph.frame import Frame
from fastslim.graph.known import Dim, name_of
from fastslim.graph.leaks import OUT_OF_SIGHT
from fastslim.graph.propagate import Propagation

_SCALES = frozenset("mul mul_ __mul__ __rmul__ __imul__ multiply div div_ true_divide __truediv__ __itruediv__".split())
_MOVES = frozenset(
    "t T mT transpose permute swapaxes contiguous to float type_as "
    "view reshape flatten unflatten squeeze unsqueeze".split()
)


def keep_if_scaled(p: Propagation, node: fx.Node, dim: Dim, size: int) -> None:
    """Keeps the summed entries of `node` full where its operands or its result are scaled by their number.

    A number that was computed when the model was built does not follow a width, so the sum must not either. One that
    forward computes from a size is right as long as forward is not rewritten, and it is not then.
    """
    if dim is None or size < 2:
        return
    numbers = [n for other in _around(node) for n in _scales(other) if _is_made_of(size, n)]
    if any(_is_stored(p.frame, n) or not _computes_with(p.frame, size) for n in numbers):
        p.keep_full(dim, "is summed and scaled by a number made of how many there are")


def _scales(node: fx.Node) -> list[float]:
    return [abs(a) for a in node.args if isinstance(a, (int, float))] if name_of(node) in _SCALES else []


def _is_made_of(size: int, number: float) -> bool:
    return any(math.isclose(number, size**power, rel_tol=1e-6) for power in (1, -1, 0.5, -0.5, 0.25, -0.25))


def _is_stored(frame: Frame, number: float) -> bool:
    stored = [abs(value) for value in vars(frame.module).values() if isinstance(value, (int, float))]
    return any(math.isclose(number, value, rel_tol=1e-6) for value in stored)


def _computes_with(frame: Frame, size: int) -> bool:
    """Whether forward takes the size, or some size, as a plain number."""
    return OUT_OF_SIGHT in frame.obstacles or any(g.value == size and not g.compares for g in frame.guards)


def _around(node: fx.Node) -> Iterator[fx.Node]:
    """What is done to operands before and to the result behind, up to operations that only move entries."""
    for user in node.users:
        yield user
        if name_of(user) in _MOVES:
            yield from user.users
    for operand in node.all_input_nodes:
        while name_of(operand) in _MOVES and operand.all_input_nodes:
            operand = operand.all_input_nodes[0]
        yield operand
