"""Which pixels and taps a convolution multiplies, per dimension: of its output, and of the phases of its input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Taps(NamedTuple):
    """One dimension of a product over pixels: which are computed, what they read, with which taps.

    Attributes:
        size: pixels computed; pixel `h` of them stands at ``to + step * h``.
        origin: pixel `h` reads, for its tap `t`, at ``origin + pace * h + reach * t``,
        first: the tap ``first + skip * t`` of the kernel.
        taps: number of a pixel's taps.
    """

    size: int
    to: int
    step: int
    origin: int
    pace: int
    reach: int
    first: int
    skip: int
    taps: int


def forward_taps(out_size: int, kernel: int, stride: int, padding: int, dilation: int) -> Taps:
    """All taps of every output pixel."""
    return Taps(out_size, 0, 1, -padding, stride, dilation, 0, 1, kernel)


def phase_taps(phase: int, in_size: int, kernel: int, stride: int, padding: int, dilation: int) -> Taps:
    """The taps that reach the input pixels `phase, phase + stride, ...`, and where they read the output's gradient.

    Pixel h takes tap r from output pixel (h + padding - r * dilation) / stride where that is whole.
    """
    size = -(-max(in_size - phase, 0) // stride)
    taps = [r for r in range(kernel) if (phase + padding - r * dilation) % stride == 0]
    if not taps:
        return Taps(size, phase, stride, 0, 1, 0, 0, 1, 0)
    skip = taps[1] - taps[0] if len(taps) > 1 else 1
    origin = (phase + padding - taps[0] * dilation) // stride
    return Taps(size, phase, stride, origin, 1, -(skip * dilation) // stride, taps[0], skip, len(taps))


def products(
    out_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
) -> list[tuple[Taps, Taps]]:
    """Taps of rows and columns of each product: one forward, one for every phase of the stride with `transposed`."""
    sides = []
    for size, *settings in zip(out_size, kernel, stride, padding, dilation, strict=True):
        phases = [phase_taps(phase, size, *settings) for phase in range(settings[1])]
        sides.append(phases if transposed else [forward_taps(size, *settings)])
    return [(down, across) for down in sides[0] for across in sides[1]]
