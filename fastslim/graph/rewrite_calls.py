"""What the code of a rewritten forward calls: cut stored tensors, write them back, compare sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastslim.errors import FastslimRuntimeError
from fastslim.graph.units import Segments
from fastslim.ops.segments import cut, pieces

# Per dimension (active entries, ranges), or None where all are.
Ranges = tuple[tuple[int, Segments | None] | None, ...]


def take(tensor: Tensor, ranges: Ranges) -> Tensor:
    """The active part of a stored tensor: a view where prefixes are active, else gathered."""
    for dim, own in enumerate(ranges):
        if own is not None:
            tensor = cut(tensor, dim, own[1], own[0])
    return tensor


@torch.no_grad()
def put_back(tensor: Tensor, part: Tensor, ranges: Ranges) -> None:
    """Writes a gathered part of a buffer back, as forward may have changed it."""
    if any(own is not None and own[1] is not None for own in ranges):
        wholes, parts = [tensor], [part]
        for dim, own in enumerate(ranges):
            if own is not None:
                places = pieces(own[1], own[0])
                wholes = [one.narrow(dim, start, count) for one in wholes for start, _, count in places]
                parts = [one.narrow(dim, offset, count) for one in parts for _, offset, count in places]
        for whole, piece in zip(wholes, parts, strict=True):
            whole.copy_(piece)


def check_number(value: Any, recorded: Any, place: str) -> None:
    """Refuses a size for which the recorded forward does not hold.

    Raises:
        FastslimRuntimeError: when it is another one than the example's.
    """
    if value != recorded:
        raise FastslimRuntimeError(
            f"at narrow widths this module runs a forward that was recorded with the example inputs, and at {place} "
            f"Python code decides by {'a comparison of sizes' if isinstance(recorded, bool) else 'a size'}: it was "
            f"{recorded} there and is {value} now. Convert with example inputs of the size you use, or exclude the "
            "module"
        )
