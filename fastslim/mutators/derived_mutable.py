"""`DerivedMutable`: a choice that is computed from other mutables' choices, whenever it is asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from fastslim.errors import FastslimRuntimeError, FastslimTypeError, FastslimValueError
from fastslim.mutators.mutable import BaseMutable, DumpChosen
from fastslim.nn import active_segments
from fastslim.ops.segments import total

Number = int | float


class DerivedMethodMixin:
    """Ways to derive a mutable from this one, which follows it from then on."""

    def derive_same_mutable(self) -> DerivedMutable:
        """A mutable with the same choice."""
        return self.derive_expand_mutable(1)

    def derive_expand_mutable(self, expand_ratio: Number | BaseMutable) -> DerivedMutable:
        """A mutable with `expand_ratio` times as many channels, of which as many times more are active.

        Args:
            expand_ratio: a number, or a mutable whose choice is one and is asked for anew each time.
        """
        if isinstance(expand_ratio, bool) or not isinstance(expand_ratio, (int, float, BaseMutable)):
            raise FastslimTypeError(f"the ratio must be a number or a mutable, got {type(expand_ratio).__name__}")
        return _derive(_Expanded(self, expand_ratio), self, expand_ratio)

    def derive_divide_mutable(self, ratio: Number | BaseMutable, divisor: int = 8) -> DerivedMutable:
        """A mutable with ``1 / ratio`` of the channels, rounded to multiples of `divisor`.

        Args:
            ratio: a number (of a fraction the whole part), or a mutable whose choice is one.
            divisor: counts for a whole `ratio` only, as in MMRazor.
        """
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float, BaseMutable)):
            raise FastslimTypeError(f"the ratio must be a number or a mutable, got {type(ratio).__name__}")
        return _derive(_Divided(self, ratio, divisor if isinstance(ratio, int) else 1), self, ratio)

    def __mul__(self, other: Any) -> DerivedMutable:
        if has_mask(self) and isinstance(other, BaseMutable) and not hasattr(other, "max_choice"):
            raise FastslimTypeError(
                f"channels times {other!r}: use a number, or a OneShotMutableValue, which has a max"
            )
        return self.derive_expand_mutable(other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> DerivedMutable:
        """``mutable // other`` for a number, a pair (ratio, divisor), or a mutable value."""
        if isinstance(other, tuple) and len(other) == 2:
            return self.derive_divide_mutable(*other)
        if isinstance(other, float):
            other = int(other)
        return self.derive_divide_mutable(other)

    @staticmethod
    def derive_concat_mutable(mutables: Iterable[Any]) -> DerivedMutable:
        """The channels of several mutables side by side, as behind `torch.cat`.

        Raises:
            FastslimRuntimeError: one of them has no channels.
        """
        parts = list(mutables)
        for part in parts:
            if not has_mask(part):
                raise FastslimRuntimeError(f"{part} has no channels (no current_mask) to be concatenated")
        rule = _Concatenated(parts)
        return DerivedMutable(rule.choice, rule.mask, sources_of(parts))


class DerivedMutable(BaseMutable, DerivedMethodMixin):
    """A mutable without a choice of its own.

    Args:
        choice_fn: gives the present choice.
        mask_fn: gives the present mask; without it the mutable chooses a value, no channels.
        source_mutables: what it depends on; by default the mutables that the functions close over.
        alias: another name.
        init_cfg: accepted for MMRazor's sake.

    Raises:
        FastslimRuntimeError: the functions close over no mutable.
        FastslimValueError: a source is derived itself, or no mutable.

    Example:
        >>> channels = SequentialMutableChannel(3)
        >>> twice = channels * 2
        >>> channels.current_choice = 2
        >>> twice.current_choice
        4
    """

    is_composite = True

    def __init__(
        self,
        choice_fn: Callable[[], Any],
        mask_fn: Callable[[], Tensor] | None = None,
        source_mutables: Iterable[BaseMutable] | None = None,
        alias: str | None = None,
        init_cfg: Any = None,
    ) -> None:
        super().__init__(alias, init_cfg)
        self.choice_fn, self.mask_fn = choice_fn, mask_fn
        if source_mutables is None:
            functions = [choice_fn] if mask_fn is None else [choice_fn, mask_fn]
            sources = sources_of([inspect.getclosurevars(fn).nonlocals for fn in functions])
            if not sources:
                raise FastslimRuntimeError("no mutable was found in the functions; list them as source_mutables")
        else:
            sources = set(source_mutables)
        for source in sources:
            if not self.is_source_mutable(source):
                raise FastslimValueError(f"source_mutables must be mutables that are not derived, got {source}")
        self.source_mutables = sources

    @staticmethod
    def is_source_mutable(mutable: object) -> bool:
        """Whether it is a mutable with a choice of its own."""
        return isinstance(mutable, BaseMutable) and not isinstance(mutable, DerivedMutable)

    @property
    def is_fixed(self) -> bool:
        """Whether all sources are."""
        return all(source.is_fixed for source in self.source_mutables)

    @is_fixed.setter
    def is_fixed(self, is_fixed: bool) -> None:
        raise FastslimRuntimeError("a derived mutable is fixed when its source_mutables are; fix those")

    @property
    def current_choice(self) -> Any:
        """The present choice."""
        return self.choice_fn()

    @current_choice.setter
    def current_choice(self, choice: Any) -> None:
        raise FastslimRuntimeError("the choice of a derived mutable follows its source_mutables; set theirs")

    @property
    def current_mask(self) -> Tensor:
        """Which channels are active.

        Raises:
            FastslimRuntimeError: it chooses no channels.
        """
        if self.mask_fn is None:
            raise FastslimRuntimeError("this derived mutable has no channels: it was made without mask_fn")
        return self.mask_fn()

    @current_mask.setter
    def current_mask(self, mask: Tensor) -> None:
        raise FastslimRuntimeError("the mask of a derived mutable follows its source_mutables; set their choice")

    @property
    def activated_channels(self) -> int:
        """How many channels are active."""
        return int(self.current_mask.sum())

    @property
    def num_choices(self) -> int:
        """1: it has no choice of its own."""
        return 1

    @property
    def choices(self) -> list[Any]:
        """What it can be, for all choices of its sources."""
        sources: list[Any] = list(self.source_mutables)
        before = [source.current_choice for source in sources]
        found = []
        for combination in product(*(source.choices for source in sources)):
            for source, choice in zip(sources, combination, strict=True):
                source.current_choice = choice
            found.append(self.choice_fn())
        for source, choice in zip(sources, before, strict=True):
            source.current_choice = choice
        return found

    def fix_chosen(self, chosen: Any = None) -> None:
        """Does nothing: the sources are what can be fixed."""

    def dump_chosen(self) -> DumpChosen:
        """The present choice."""
        return DumpChosen(chosen=self.export_chosen())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(current_choice={self.current_choice}, is_fixed={self.is_fixed})"


class _Expanded:
    """Plain objects in the place of closures: a copy of a network brings copies of them along."""

    def __init__(self, mutable: Any, ratio: Any) -> None:
        self.mutable, self.ratio = mutable, ratio

    def choice(self) -> int:
        return int(amount(self.mutable) * _value(self.ratio))

    def mask(self) -> Tensor:
        mask = self.mutable.current_mask
        if isinstance(self.ratio, int):
            expanded: Tensor = mask.bool().repeat_interleave(self.ratio)
            return expanded
        choices: Any = self.ratio.choices if isinstance(self.ratio, BaseMutable) else [self.ratio]
        largest = max(choices)
        return filled(int(len(mask) * largest), [(0, self.choice())])


class _Divided:
    def __init__(self, mutable: Any, ratio: Any, divisor: int) -> None:
        self.mutable, self.ratio, self.divisor = mutable, ratio, divisor

    def _part(self, number: Number) -> int:
        asked, step = int(number // int(_value(self.ratio))), self.divisor
        width = max(step, int(asked + step / 2) // step * step)
        return width if width >= 0.9 * asked else width + step

    def choice(self) -> int:
        return self._part(amount(self.mutable))

    def mask(self) -> Tensor:
        return filled(self._part(len(self.mutable.current_mask)), [(0, self.choice())])


class _Concatenated:
    def __init__(self, mutables: list[Any]) -> None:
        self.mutables = mutables

    def choice(self) -> int:
        return sum(int(amount(mutable)) for mutable in self.mutables)

    def mask(self) -> Tensor:
        return torch.cat([mutable.current_mask.cpu() for mutable in self.mutables])


def _concat_choice_fn(mutables: Iterable[Any]) -> Callable[[], int]:
    return _Concatenated(list(mutables)).choice


def _concat_mask_fn(mutables: Iterable[Any]) -> Callable[[], Tensor]:
    return _Concatenated(list(mutables)).mask


def sources_of(values: Any) -> set[BaseMutable]:
    """All mutables with a choice of their own in nested collections."""
    if isinstance(values, DerivedMutable):
        return set(values.source_mutables)
    if isinstance(values, BaseMutable):
        return {values}
    if isinstance(values, Mapping):
        values = [*values.keys(), *values.values()]
    elif isinstance(values, (str, bytes, Tensor, nn.Module)) or not isinstance(values, Iterable):
        return set()
    return set().union(*(sources_of(value) for value in values))


def has_mask(mutable: Any) -> bool:
    """Whether it chooses channels."""
    if isinstance(mutable, DerivedMutable):
        return mutable.mask_fn is not None
    return isinstance(getattr(mutable, "current_mask", None), Tensor)


def amount(mutable: Any) -> Number:
    """How many channels are active, or the value that is chosen."""
    number: Number = total(active_segments(mutable)) if has_mask(mutable) else mutable.current_choice
    return number


def filled(full: int, segments: Iterable[tuple[int, int]]) -> Tensor:
    """A mask of `full` entries that is true in the segments."""
    mask = torch.zeros(full, dtype=torch.bool)
    for start, count in segments:
        mask[start : start + count] = True
    return mask


def _value(ratio: Any) -> Number:
    number: Number = ratio.current_choice if isinstance(ratio, BaseMutable) else ratio
    return number


def _derive(rule: Any, source: Any, ratio: Any) -> DerivedMutable:
    return DerivedMutable(rule.choice, rule.mask if has_mask(source) else None, sources_of([source, ratio]))
