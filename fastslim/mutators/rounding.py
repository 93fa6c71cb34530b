"""Widths that the hardware and the layers like."""

from __future__ import annotations

import math


def round_width(
    asked: float,
    channels: int,
    divisor: int = 1,
    min_value: int | None = None,
    min_ratio: float = 0.9,
    granularity: int = 1,
) -> int:
    """The width nearest to the asked one that the hardware and the layer like.

    Args:
        asked: wanted number of channels.
        channels: full width; never exceeded, and kept by a unit smaller than `divisor`.
        divisor: widths are multiples of it (the full width excepted).
        min_value: smallest width; `divisor` when None.
        min_ratio: never less than this part of `asked`.
        granularity: multiple that the layers themselves need.

    Returns:
        The number of channels.
    """
    step = math.lcm(divisor, granularity)
    if channels <= step or asked >= channels:
        return channels
    least = math.ceil(max(min_value or 1, 1) / step) * step
    width = max(least, int(asked + step / 2) // step * step)
    if width < min_ratio * asked:
        width += step
    return min(width, channels)
