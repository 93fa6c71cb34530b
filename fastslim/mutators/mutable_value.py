"""Mutables that choose one of several values, such as the ratio by which a block widens its channels."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from fastslim.contract_errors import AssertedValueError
from fastslim.errors import FastslimTypeError, FastslimValueError
from fastslim.mutators.derived_mutable import DerivedMethodMixin, DerivedMutable, has_mask
from fastslim.mutators.mutable import BaseMutable, DumpChosen
from fastslim.registry import MODELS


@MODELS.register_module()
class MutableValue(BaseMutable, DerivedMethodMixin):
    """One of a list of values.

    Args:
        value_list: the values, all of one type.
        default_value: the first choice; the first value by default.
        alias: another name.
        init_cfg: accepted for MMRazor's sake.

    Raises:
        FastslimValueError: an empty list, or a default that is not in it.
        FastslimTypeError: values of several types.
    """

    def __init__(
        self, value_list: Sequence[Any], default_value: Any = None, alias: str | None = None, init_cfg: Any = None
    ) -> None:
        super().__init__(alias, init_cfg)
        self._value_list = list(value_list)
        if not self._value_list:
            raise FastslimValueError("value_list is empty; list at least one value")
        if len({type(value) for value in self._value_list}) > 1:
            raise FastslimTypeError(f"the values must be of one type, got {self._value_list}")
        self.current_choice = self._value_list[0] if default_value is None else default_value

    @property
    def choices(self) -> list[Any]:
        """The values to choose from."""
        return self._value_list

    @property
    def num_choices(self) -> int:
        """How many there are."""
        return len(self._value_list)

    @property
    def current_choice(self) -> Any:
        """The present value."""
        return self._current_choice

    @current_choice.setter
    def current_choice(self, choice: Any) -> None:
        if choice not in self._value_list:
            raise AssertedValueError(f"{choice!r} is no choice of this mutable; choose one of {self._value_list}")
        self._current_choice = choice

    def dump_chosen(self) -> DumpChosen:
        """The present value, and all there are."""
        return DumpChosen(chosen=self.export_chosen(), meta={"all_choices": self._value_list})

    def __mul__(self, other: Any) -> DerivedMutable:
        if has_mask(other):
            derived: DerivedMutable = other * self
            return derived
        return super().__mul__(other)

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return f"{type(self).__name__}(value_list={self._value_list}, current_choice={self.current_choice})"


@MODELS.register_module()
class OneShotMutableValue(MutableValue):
    """A value that can be sampled; the list is sorted, and the largest value is the first choice.

    Args:
        value_list: the values, all of one type.
        default_value: the first choice; the largest value by default.
        alias: another name.
        init_cfg: accepted for MMRazor's sake.
    """

    def __init__(
        self, value_list: Sequence[Any], default_value: Any = None, alias: str | None = None, init_cfg: Any = None
    ) -> None:
        values = sorted(value_list)
        super().__init__(values, values[-1] if default_value is None and values else default_value, alias, init_cfg)

    def sample_choice(self) -> Any:
        """One of the values, all equally likely."""
        return random.choice(self._value_list)

    @property
    def max_choice(self) -> Any:
        """The largest value."""
        return self._value_list[-1]

    @property
    def min_choice(self) -> Any:
        """The smallest value."""
        return self._value_list[0]
