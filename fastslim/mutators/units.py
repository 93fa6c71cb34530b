"""Channel units of a supernet: the widths each may take, and the one it has."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from fastslim.contract_errors import AssertedValueError
from fastslim.errors import FastslimTypeError, FastslimValueError
from fastslim.graph import UnitSpec
from fastslim.mutators.mutable_channel import SquentialMutableChannel, number_of_channels
from fastslim.mutators.mutable_unit import MutableChannelUnit
from fastslim.mutators.rounding import round_width
from fastslim.registry import MODELS

Number = int | float


@MODELS.register_module()
class SequentialMutableChannelUnit(MutableChannelUnit):
    """A unit that may take every width that `divisor` and `min_value` leave; other widths are rounded to them.

    Args:
        num_channels: full width.
        choice_mode: "number" or "ratio": how choices of this unit are written (`candidate_mode` is the old name).
        divisor: widths are multiples of it.
        min_value: smallest width, if it is more than `divisor`.
        min_ratio: rounding never goes below this part of the asked width.
        name: of the unit.
        spec: what the trace knows of it.

    Attributes:
        candidate_widths: what it may take.
        mutable_channel: the present choice, for layers that ask for it.
        is_traced: a trace says which layers follow, and how; else the listed layers must say that they can.
    """

    #: Whether its channels may be others than the first ones.
    picks_channels = False
    mutable_channel_class = SquentialMutableChannel
    init_args: tuple[str, ...] = ("choice_mode", "divisor", "min_value", "min_ratio")

    def __init__(
        self,
        num_channels: int,
        choice_mode: str = "number",
        divisor: int = 1,
        min_value: int | None = 1,
        min_ratio: float = 0.9,
        *,
        candidate_mode: str | None = None,
        name: str = "",
        spec: UnitSpec | None = None,
    ) -> None:
        choice_mode = candidate_mode or choice_mode
        if choice_mode not in ("number", "ratio"):
            raise FastslimValueError(f"choice_mode must be 'number' or 'ratio', got {choice_mode!r}")
        for key, value in dict(num_channels=num_channels, divisor=divisor, min_value=min_value).items():
            if not (value is None and key == "min_value") and (type(value) is not int or value < 1):
                raise FastslimValueError(f"{key} must be a positive whole number, got {value!r}")
        if not 0 <= min_ratio <= 1:
            raise FastslimValueError(f"min_ratio must lie between 0 and 1, got {min_ratio!r}")
        super().__init__(num_channels, name=name or (spec.name if spec else ""))
        self.choice_mode, self.divisor = choice_mode, divisor
        self.min_value, self.min_ratio = min_value, min_ratio
        self.is_traced = spec is not None
        self.spec = spec or UnitSpec(name, num_channels, ())
        self.candidate_widths: tuple[int, ...] = (num_channels,)
        self.mutable_channel = self.mutable_channel_class(num_channels, choice_mode)
        self._set_candidates(self._asked_widths())

    @classmethod
    def init_from_mutable_channel(cls, mutable_channel: SquentialMutableChannel) -> Any:
        """The unit of the layers that follow a mutable; its choice is the mutable's, its widths the candidates."""
        listed: dict[str, Any] = (
            {"candidate_choices": mutable_channel.choices} if "candidate_choices" in cls.init_args else {}
        )
        unit = cls(mutable_channel.num_channels, choice_mode=mutable_channel.choice_mode, **listed)
        unit.mutable_channel, before = mutable_channel, mutable_channel.width
        unit._set_candidates([mutable_channel.as_width(choice) for choice in mutable_channel.choices])
        unit.width = before
        return unit

    @property
    def width(self) -> int:
        """Active channels now; assigning does not tell the layers of a mutator."""
        return self.mutable_channel.width

    @width.setter
    def width(self, width: int) -> None:
        self.mutable_channel.__dict__["width"] = width  # nn.Module's own way would cost more than all the rest

    @property
    def on_change(self) -> Callable[[], None] | None:
        """Called after a new choice."""
        return self.mutable_channel.on_change

    @on_change.setter
    def on_change(self, function: Callable[[], None] | None) -> None:
        self.mutable_channel.on_change = function

    def _asked_widths(self) -> Sequence[float]:
        return range(1, self.num_channels + 1)

    def _set_candidates(self, asked: Sequence[float]) -> None:
        widths = {self.round(width) for width in asked} if self.spec.mutable else {self.num_channels}
        self.candidate_widths = tuple(sorted(widths))
        self._allowed = frozenset(widths)
        self.width = self.candidate_widths[-1]

    def round(self, asked: float) -> int:
        """The width the unit's rules make of an asked number of channels."""
        return round_width(
            asked, self.num_channels, self.divisor, self.min_value, self.min_ratio, self.spec.granularity
        )

    @property
    def is_num_mode(self) -> bool:
        """Whether choices are written as numbers of channels."""
        return self.choice_mode == "number"

    @property
    def is_mutable(self) -> bool:
        """Whether there is more than one width to choose from."""
        if len(self.candidate_widths) < 2:
            return False
        return self.is_traced or not (self.input_related or self.output_related) or super().is_mutable

    @property
    def candidate_choices(self) -> list[Number]:
        """The widths to choose from, ascending and without repeats, as the choice mode writes them."""
        return [self.as_choice(width) for width in self.candidate_widths]

    @property
    def current_choice(self) -> Number:
        """The present choice, as the choice mode writes it; assigning sets the layers, too."""
        return self.as_choice(self.width)

    @current_choice.setter
    def current_choice(self, choice: Number) -> None:
        self.width = self.as_width(choice)
        if self.on_change is not None:
            self.on_change()

    @property
    def max_choice(self) -> Number:
        """The widest choice."""
        return self.as_choice(self.candidate_widths[-1])

    @property
    def min_choice(self) -> Number:
        """The narrowest choice."""
        return self.as_choice(self.candidate_widths[0])

    def sample_choice(self, rng: random.Random | None = None) -> Number:
        """One of the choices, all equally likely."""
        return self.as_choice((rng or random).choice(self.candidate_widths))

    def fix_chosen(self, choice: Number | None = None) -> None:
        """Leaves `choice`, or the present one, as the only one."""
        if choice is not None:
            self.current_choice = choice
        self.candidate_widths, self._allowed = (self.width,), frozenset((self.width,))
        if not self.mutable_channel.is_fixed:
            self.mutable_channel.fix_chosen()

    def check_width(self, width: int) -> int:
        """The width itself, if the layers can have it, be it a candidate or not.

        Raises:
            FastslimValueError: they cannot.
        """
        steps = self.spec.granularity
        if width in self._allowed or (self.spec.mutable and 0 < width <= self.num_channels and width % steps == 0):
            return width
        kind = f"multiples of {steps} up to {self.num_channels}" if self.spec.mutable else f"only {self.num_channels}"
        raise FastslimValueError(
            f"unit {self.name!r} cannot have {width} channels; it takes {kind}"
            + (f" ({self.spec.reason})" if self.spec.reason else "")
        )

    def nearest_width(self, ratio: float) -> int:
        """The candidate nearest to `ratio` of the full width; the wider one of two."""
        return min(reversed(self.candidate_widths), key=lambda width: abs(width - ratio * self.num_channels))

    def as_choice(self, width: int) -> Number:
        """A width as the choice mode writes it."""
        return width if self.choice_mode == "number" else width / self.num_channels

    def as_width(self, choice: Any) -> int:
        """The width that a choice means: a whole number is a width, a float a ratio of the full one.

        Raises:
            FastslimValueError: when it is not one of the candidates, nor may be rounded to one.
            FastslimTypeError: when it is no number.
        """
        if type(choice) is int and (choice in self._allowed or choice == self.width):
            return choice
        if isinstance(choice, bool) or not isinstance(choice, (int, float)):
            raise FastslimTypeError(f"the choice of unit {self.name!r} must be a number, got {choice!r}")
        width = self._meant(choice)
        if width not in self._allowed:
            raise AssertedValueError(
                f"{choice!r} is no choice of unit {self.name!r} ({self.num_channels} channels); widths: "
                f"{list(self.candidate_widths)}" + (f" ({self.spec.reason})" if self.spec.reason else "")
            )
        return width

    def _meant(self, choice: Number) -> int:
        """The width that a number or ratio is rounded to; 0 if it lies outside of the layer."""
        asked = number_of_channels(choice, self.num_channels, self.name)
        return self.round(asked) if 0 < asked <= self.num_channels else 0

    def config_template(self, with_init_args: bool = False, with_channels: bool = False) -> dict[str, Any]:
        """A config of this unit that a mutator, or `init_from_cfg`, accepts back."""
        config = super().config_template(with_init_args, with_channels)
        if with_init_args:
            config["init_args"].update({key: getattr(self, key) for key in self.init_args})
        config["choice"] = self.current_choice
        return config

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, width={self.width} of {self.num_channels})"
