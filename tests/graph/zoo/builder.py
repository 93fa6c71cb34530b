"""Builds layers at given sizes, with the layout of the channels tracked by hand.

A layout is a tuple of parts side by side; the narrow network holds the first channels of each part. Behind a shuffle
everything is one part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .architecture import Widths


@dataclass(frozen=True)
class Part:
    """Channels counted by widths: so many for each."""

    widths: tuple[tuple[str, int], ...]

    def count(self, sizes: Widths) -> int:
        return sum(sizes[name] * factor for name, factor in self.widths)

    def times(self, factor: int) -> Part:
        return Part(tuple((name, n * factor) for name, n in self.widths))


Layout = tuple[Part, ...]


def times(layout: Layout, factor: int) -> Layout:
    return tuple(part.times(factor) for part in layout)


class Builder:
    """Builds the steps at given sizes, and notes how each parameter is cut."""

    def __init__(self, sizes: Widths) -> None:
        self.given, self.full, self.sizes = sizes, {"one": 1}, {"one": 1}
        self.shown: dict[str, str] = {}
        self.cuts: dict[str, Any] = {}
        self.layout: Layout = (Part((("one", 3),)),)
        self.prefix, self.pixels = "", 8

    def new(self, place: str, size: int, divisor: int = 1) -> Layout:
        """A width of its own, to be read at `place`."""
        name = f"w{len(self.full)}"
        self.full[name], self.sizes[name] = size, self.given.get(name, size)
        self.shown[name] = f"{self.prefix}{place}/{divisor}"
        return (Part(((name, 1),)),)

    def count(self, layout: Layout) -> int:
        return sum(part.count(self.sizes) for part in layout)

    def group(self, layout: Layout, wanted: int) -> int:
        """The size of a group such that the full network has several: one alone would not be kept."""
        return wanted if sum(part.count(self.full) for part in layout) > wanted else wanted // 2

    def cut(self, pattern: str, layout: Layout) -> None:
        def cut(full: int, narrow: int, wide: Widths, widths: Widths) -> list[int]:
            index: list[int] = []
            start = 0
            for part in layout:
                index += range(start, start + part.count({"one": 1, **widths}))
                start += part.count({"one": 1, **wide})
            assert (start, len(index)) == (full, narrow)
            return index

        self.cuts[self.prefix + pattern] = cut

    def conv(self, name: str, i: Layout, o: Layout, k: int = 3, **options: Any) -> nn.Conv2d:
        if "groups" not in options:
            self.cut(f"{name}.weight:1", i)
        self.cut(f"{name}.*:0", o)
        return nn.Conv2d(self.count(i), self.count(o), k, padding=k // 2, **options)

    def linear(self, name: str, i: Layout, o: Layout) -> nn.Linear:
        self.cut(f"{name}.weight:1", i)
        self.cut(f"{name}.*:0", o)
        return nn.Linear(self.count(i), self.count(o))

    def norm(self, name: str, layout: Layout) -> nn.BatchNorm2d:
        self.cut(f"{name}.*:0", layout)
        return nn.BatchNorm2d(self.count(layout))
