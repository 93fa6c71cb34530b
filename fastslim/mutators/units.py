"""Channel units of a supernet: the widths each may take, and the one it has."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from fastslim.errors import FastslimTypeError, FastslimValueError, nearest
from fastslim.graph import UnitSpec
from fastslim.registry import MODELS

Number = int | float


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


@MODELS.register_module()
class SequentialMutableChannelUnit:
    """A unit that may take every width that `divisor` and `min_value` leave.

    Args:
        num_channels: full width.
        choice_mode: "number" or "ratio": how choices of this unit are written (`candidate_mode` is the old name).
        divisor: widths are multiples of it.
        min_value: smallest width; `divisor` when None.
        min_ratio: rounding never goes below this part of the asked width.
        name: of the unit.
        spec: what the trace knows of it.

    Attributes:
        width: active channels now.
    """

    init_args: tuple[str, ...] = ("choice_mode", "divisor", "min_value", "min_ratio")

    def __init__(
        self,
        num_channels: int,
        choice_mode: str = "number",
        divisor: int = 1,
        min_value: int | None = None,
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
        self.num_channels, self.choice_mode, self.divisor = num_channels, choice_mode, divisor
        self.min_value, self.min_ratio = min_value, min_ratio
        self.name = name or (spec.name if spec else "")
        self.spec = spec or UnitSpec(self.name, num_channels, ())
        self.width = num_channels
        self.on_change: Callable[[], None] | None = None
        self.candidate_widths: tuple[int, ...] = (num_channels,)
        self._set_candidates(self._asked_widths())

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
    def is_mutable(self) -> bool:
        """Whether there is more than one width to choose from."""
        return len(self.candidate_widths) > 1

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

    def fix_chosen(self) -> None:
        """Leaves the present width as the only one."""
        self.candidate_widths, self._allowed = (self.width,), frozenset((self.width,))

    def nearest_width(self, ratio: float) -> int:
        """The candidate nearest to `ratio` of the full width; the wider one of two."""
        return min(reversed(self.candidate_widths), key=lambda width: abs(width - ratio * self.num_channels))

    def as_choice(self, width: int) -> Number:
        """A width as the choice mode writes it."""
        return width if self.choice_mode == "number" else width / self.num_channels

    def as_width(self, choice: Any) -> int:
        """The width that a choice means: a whole number is a width, a float a ratio of the full one.

        Raises:
            FastslimValueError: when it is not one of the candidates.
            FastslimTypeError: when it is no number.
        """
        if choice in self._allowed and type(choice) is int:
            return choice
        if isinstance(choice, bool) or not isinstance(choice, (int, float)):
            raise FastslimTypeError(f"the choice of unit {self.name!r} must be a number, got {choice!r}")
        width: int | None = None
        if isinstance(choice, float):
            asked = choice * self.num_channels if choice <= 1 else choice
            width = next((w for w in self.candidate_widths if abs(w - asked) < 1e-6 * self.num_channels), None)
            if width is None and 0 < choice <= 1 and self.round(asked) in self._allowed:
                width = self.round(asked)  # a ratio from a config, such as 1/12, stands for what it rounds to
        if width is None:
            raise FastslimValueError(
                f"{choice!r} is no choice of unit {self.name!r} ({self.num_channels} channels); widths: "
                f"{list(self.candidate_widths)}" + (f" ({self.spec.reason})" if self.spec.reason else "")
            )
        return width

    def config_template(self, with_init_args: bool = False, with_channels: bool = False) -> dict[str, Any]:
        """A config of this unit that a mutator accepts back."""
        config: dict[str, Any] = {"choice": self.current_choice}
        if with_init_args:
            config["init_args"] = {"num_channels": self.num_channels, **{k: getattr(self, k) for k in self.init_args}}
        if with_channels:
            config["channels"] = {"members": list(self.spec.members), "num_channels": self.num_channels}
        return config

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, width={self.width} of {self.num_channels})"


@MODELS.register_module()
class OneShotMutableChannelUnit(SequentialMutableChannelUnit):
    """A unit that may take the listed widths.

    Args:
        num_channels: full width.
        candidate_choices: ratios of the full width, or numbers of channels. They are rounded to `divisor` and clipped
            to the layer; what becomes equal is kept once, so that sampling stays even.
        choice_mode: "ratio" or "number".
        divisor: see `SequentialMutableChannelUnit`, as for the others.
        min_value: smallest width.
        min_ratio: rounding bound.
        **kwargs: name, spec, candidate_mode.
    """

    init_args = ("candidate_choices", *SequentialMutableChannelUnit.init_args)

    def __init__(
        self,
        num_channels: int,
        candidate_choices: Sequence[Number] = (0.5, 1.0),
        choice_mode: str = "ratio",
        divisor: int = 1,
        min_value: int | None = None,
        min_ratio: float = 0.9,
        **kwargs: Any,
    ) -> None:
        mode = kwargs.get("candidate_mode") or choice_mode
        if not candidate_choices:
            raise FastslimValueError("candidate_choices is empty; list at least one ratio or width")
        for choice in candidate_choices:
            if isinstance(choice, bool) or not isinstance(choice, (int, float)) or not choice > 0:
                raise FastslimValueError(f"candidate_choices holds {choice!r}; positive numbers are needed")
            if mode == "ratio" and choice > 1:
                raise FastslimValueError(
                    f"candidate_choices holds {choice!r}, above the full width; use ratios up to "
                    "1.0, or choice_mode='number'"
                )
        self._listed = [choice * num_channels if mode == "ratio" else choice for choice in candidate_choices]
        super().__init__(num_channels, choice_mode, divisor, min_value, min_ratio, **kwargs)

    def _asked_widths(self) -> Sequence[float]:
        return self._listed


@MODELS.register_module()
class SlimmableChannelUnit(OneShotMutableChannelUnit):
    """A unit whose n-th listed width belongs to the n-th subnet.

    Attributes:
        subnet_widths: its width in every subnet, in the listed order, repeats included.
    """

    def __init__(
        self,
        num_channels: int,
        candidate_choices: Sequence[Number] = (0.25, 0.5, 0.75, 1.0),
        choice_mode: str = "ratio",
        divisor: int = 1,
        min_value: int | None = None,
        min_ratio: float = 0.9,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_channels, candidate_choices, choice_mode, divisor, min_value, min_ratio, **kwargs)
        self.subnet_widths = tuple(self.round(width) if self.spec.mutable else num_channels for width in self._listed)

    @property
    def candidate_choices(self) -> list[Number]:
        """The width in every subnet, as the choice mode writes it."""
        return [self.as_choice(width) for width in self.subnet_widths]


def unit_type(name: Any) -> type[SequentialMutableChannelUnit]:
    """The unit class that is registered by this name, or the class itself.

    Raises:
        FastslimValueError: when there is none.
    """
    known = MODELS.get(name) if isinstance(name, str) else name
    if not isinstance(known, type) or not issubclass(known, SequentialMutableChannelUnit):
        units = [n for n in MODELS if n.endswith("Unit")]
        raise FastslimValueError(f"no channel unit is called {name!r}; {nearest(str(name), units)}")
    return known
