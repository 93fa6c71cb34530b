"""Channel segments: which channels of a full layer are active, and how its weights are cut by them.

A segment is `(start, count)`; several stand side by side behind a concat. None is the plain prefix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastslim import errors

Segments = tuple[tuple[int, int], ...]


def check_segments(op: str, segments: Segments | None, active: int, full: int) -> Segments | None:
    """Refuses segments that do not describe `active` of `full` input channels; prefixes become None.

    Raises:
        FastslimValueError: more channels than the layer has, or segments that do not fit the input.
    """
    if segments is None:
        if active > full:
            raise errors.FastslimValueError(
                f"{op}: the input has {active} channels, but the layer has only {full}; narrow the layer before it"
            )
        return None
    end = 0
    for start, count in segments:
        if count < 0 or start < end or start + count > full:
            raise errors.FastslimValueError(
                f"{op}: segments {segments} must be in order, apart, and inside the layer's {full} input channels"
            )
        end = start + count
    total = sum(count for _, count in segments)
    if total != active:
        raise errors.FastslimValueError(
            f"{op}: segments {segments} take {total} channels, but the input has {active}; "
            "the layers before it run at another width: set all widths of a unit together"
        )
    return None if end == total else segments


def check_devices(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuses parameters that lie on another device than the input.

    Raises:
        FastslimValueError: they do.
    """
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.device != x.device:
            raise errors.FastslimValueError(
                f"{op}: input on {x.device}, {name} on {parameter.device}; move both to one device"
            )


def width_error(op: str, c_out: int, full: int, what: str) -> errors.FastslimValueError:
    """What to raise for a width that a layer with `full` channels or features (`what`) cannot have."""
    problem = "exceeds the layer's" if c_out > full else "is no width of the layer's"
    return errors.FastslimValueError(f"{op}: c_out={c_out} {problem} {full} {what}; choose 1 to {full}")


def flatten(segments: Segments | None) -> list[int]:
    """`[start0, count0, start1, ...]`, the form op schemas take; empty for a prefix."""
    return [] if segments is None else [value for segment in segments for value in segment]


def unflatten(values: Sequence[int]) -> Segments | None:
    """Inverse of :func:`flatten`."""
    return tuple(zip(values[::2], values[1::2], strict=True)) if values else None


def cut(tensor: Tensor, dim: int, segments: Segments | None, active: int) -> Tensor:
    """The active part of `tensor` along `dim`: a view for a prefix, gathered for several segments."""
    if segments is None:
        return tensor if tensor.shape[dim] == active else tensor.narrow(dim, 0, active)
    return torch.cat([tensor.narrow(dim, start, count) for start, count in segments], dim)


def scaled(segments: Segments | None, factor: int) -> Segments | None:
    """Segments of a dimension that has `factor` entries per channel."""
    return None if segments is None else tuple((start * factor, count * factor) for start, count in segments)


def pieces(segments: Segments | None, active: int) -> list[tuple[int, int, int]]:
    """`(start in the full layer, start in the active tensor, count)` of every segment."""
    result, offset = [], 0
    for start, count in segments if segments is not None else ((0, active),):
        result.append((start, offset, count))
        offset += count
    return result


def cut_optional(tensor: Tensor | None, dim: int, segments: Segments | None, active: int) -> Tensor | None:
    """As :func:`cut`, for a bias or a statistic that a layer may do without."""
    return None if tensor is None else cut(tensor, dim, segments, active)


def total(segments: Segments) -> int:
    """How many channels the segments hold together."""
    return sum(count for _, count in segments)


def merged(segments: Segments | None) -> Segments | None:
    """The one spelling of these segments: none empty, none that touch, None for a prefix."""
    result: list[tuple[int, int]] = []
    for start, count in segments or ():
        if result and sum(result[-1]) == start:
            result[-1] = (result[-1][0], result[-1][1] + count)
        elif count:
            result.append((start, count))
    return None if segments is None or [start for start, _ in result] == [0] else tuple(result)
