"""Mutables that choose channels: an arbitrary mask, any prefix, or one of several prefixes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastslim.errors import FastslimTypeError, FastslimValueError
from fastslim.mutators.derived_mutable import DerivedMethodMixin, DerivedMutable, filled
from fastslim.mutators.mutable import BaseMutable, DumpChosen
from fastslim.registry import MODELS

Number = int | float


class BaseMutableChannel(BaseMutable, DerivedMethodMixin):
    """Chooses some of `num_channels` channels; dynamic layers follow its `current_mask`.

    Args:
        num_channels: of the full layer.
        **kwargs: alias, init_cfg.
    """

    def __init__(self, num_channels: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if isinstance(num_channels, bool) or not isinstance(num_channels, int) or num_channels < 1:
            raise FastslimValueError(f"num_channels must be a positive whole number, got {num_channels!r}")
        self.name, self.num_channels = "", num_channels

    @property
    def current_mask(self) -> Tensor:
        """Which channels are active: booleans, one per channel."""
        raise FastslimTypeError(f"{type(self).__name__} does not say its current_mask")

    @property
    def activated_channels(self) -> int:
        """How many channels are active."""
        return int(self.current_mask.sum())

    def export_chosen(self) -> Any:
        """How many channels are active."""
        return self.activated_channels

    def dump_chosen(self) -> DumpChosen:
        """How many channels are active, and how many there are."""
        return DumpChosen(chosen=self.export_chosen(), meta={"max_channels": self.num_channels})

    def expand_mutable_channel(self, expand_ratio: Number) -> DerivedMutable:
        """Every channel `expand_ratio` times, as behind a flatten of as many pixels."""
        return self.derive_expand_mutable(expand_ratio)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_channels={self.num_channels}, activated_channels={self.activated_channels})"


@MODELS.register_module()
class SimpleMutableChannel(BaseMutableChannel):
    """Any choice of channels; the choice is the mask itself.

    Args:
        num_channels: of the full layer.
        **kwargs: alias, init_cfg.
    """

    mask: Tensor

    def __init__(self, num_channels: int, **kwargs: Any) -> None:
        super().__init__(num_channels, **kwargs)
        # It moves with the network, but a state_dict with it would not fit a plain network.
        self.register_buffer("mask", torch.ones(num_channels), persistent=False)

    @property
    def current_choice(self) -> Tensor:
        """The mask."""
        return self.mask.bool()

    @current_choice.setter
    def current_choice(self, choice: Tensor) -> None:
        choice = torch.tensor(choice) if isinstance(choice, (list, tuple)) else choice
        if not isinstance(choice, Tensor) or choice.shape != (self.num_channels,):
            got = tuple(choice.shape) if isinstance(choice, Tensor) else type(choice).__name__
            raise FastslimValueError(f"the choice must be a mask with {self.num_channels} entries, got {got}")
        self.mask = choice.to(self.mask.device).float()

    @property
    def current_mask(self) -> Tensor:
        """The mask."""
        return self.current_choice

    def export_chosen(self) -> list[int]:
        """The mask, as plain numbers."""
        numbers: list[int] = self.mask.int().tolist()
        return numbers


@MODELS.register_module()
class SquentialMutableChannel(BaseMutableChannel):
    """The first channels, however many (the spelling is MMRazor's; `SequentialMutableChannel` is the same class).

    Args:
        num_channels: of the full layer.
        choice_mode: "number" or "ratio": how the choice is read back. A whole number always sets a number of channels,
            a float up to 1 a part of them, rounded down.
        **kwargs: alias, init_cfg.
    """

    def __init__(self, num_channels: int, choice_mode: str = "number", **kwargs: Any) -> None:
        super().__init__(num_channels, **kwargs)
        if choice_mode not in ("number", "ratio"):
            raise FastslimValueError(f"choice_mode must be 'number' or 'ratio', got {choice_mode!r}")
        self.choice_mode = choice_mode
        self.width = num_channels
        #: Called after the choice was set.
        self.on_change: Callable[[], None] | None = None

    @property
    def is_num_mode(self) -> bool:
        """Whether choices are read as numbers of channels."""
        return self.choice_mode == "number"

    @property
    def current_choice(self) -> Number:
        """The present number or ratio of active channels."""
        return self.as_choice(self.width)

    @current_choice.setter
    def current_choice(self, choice: Number) -> None:
        self.width = self.as_width(choice)
        if self.on_change is not None:
            self.on_change()

    def as_choice(self, width: int) -> Number:
        """A number of channels as the choice mode writes it."""
        return width if self.is_num_mode else width / self.num_channels

    def as_width(self, choice: Number) -> int:
        """The number of channels that a choice means.

        Raises:
            FastslimTypeError: it is no number.
            FastslimValueError: it is none of 1 to `num_channels`.
        """
        width = number_of_channels(choice, self.num_channels, str(self.name or type(self).__name__))
        if not 0 < width <= self.num_channels:
            raise FastslimValueError(
                f"{choice!r} is no choice of {self.name or type(self).__name__}; choose 1 to {self.num_channels} "
                "channels, or a ratio above 0 and up to 1.0"
            )
        return width

    @property
    def mask(self) -> Tensor:
        """1.0 for every active channel."""
        return self.current_mask.float()

    @property
    def current_mask(self) -> Tensor:
        """True for the active channels."""
        return filled(self.num_channels, self.active_segments())

    def active_segments(self) -> tuple[tuple[int, int], ...]:
        """The active channels as one range."""
        return ((0, self.width),)

    @property
    def activated_channels(self) -> int:
        """How many channels are active."""
        return self.width

    @property
    def choices(self) -> list[Number]:
        """All choices."""
        return [self.as_choice(width) for width in range(1, self.num_channels + 1)]

    @property
    def num_choices(self) -> int:
        """How many choices there are."""
        return len(self.choices)

    @property
    def max_choice(self) -> Number:
        """The widest choice."""
        return self.choices[-1]

    @property
    def min_choice(self) -> Number:
        """The narrowest choice."""
        return self.choices[0]

    def sample_choice(self) -> Number:
        """One of the choices, all equally likely."""
        return random.choice(self.choices)


SequentialMutableChannel = SquentialMutableChannel


@MODELS.register_module()
class OneShotMutableChannel(SquentialMutableChannel):
    """The first channels, as many as one of the candidates says.

    Args:
        num_channels: of the full layer.
        candidate_choices: numbers or ratios; only the full width, when empty.
        choice_mode: "number" or "ratio": what the candidates are.
        **kwargs: alias, init_cfg.

    Raises:
        FastslimValueError: a candidate beyond the layer.
    """

    def __init__(
        self, num_channels: int, candidate_choices: Sequence[Number] = (), choice_mode: str = "number", **kwargs: Any
    ) -> None:
        super().__init__(num_channels, choice_mode, **kwargs)
        self.candidate_choices = sorted(candidate_choices) or [self.as_choice(num_channels)]
        for choice in self.candidate_choices:
            super().as_width(choice)

    def as_width(self, choice: Number) -> int:
        """The number of channels that a choice means, which must be a candidate's."""
        width = super().as_width(choice)
        if width not in [super(OneShotMutableChannel, self).as_width(own) for own in self.candidate_choices]:
            raise FastslimValueError(
                f"{choice!r} is no choice of {self.name or type(self).__name__}; choose one of {self.candidate_choices}"
            )
        return width

    @property
    def choices(self) -> list[Number]:
        """The candidates, ascending."""
        return list(self.candidate_choices)


MODELS.register_module("SequentialMutableChannel", module=SquentialMutableChannel)


def number_of_channels(choice: Any, num_channels: int, name: str) -> int:
    """What a choice means: a whole number as it is, a float up to 1 a part of all channels, rounded down to at least 1.

    Raises:
        FastslimTypeError: it is no number.
    """
    if isinstance(choice, bool) or not isinstance(choice, (int, float)):
        raise FastslimTypeError(f"the choice of {name} must be a number, got {choice!r}")
    if isinstance(choice, int):
        return choice
    if choice > 1:  # a number of channels that arithmetic has made a float
        return int(choice) if choice == int(choice) else num_channels + 1
    # The tolerance: 7 / 12 of 96 channels are 56, not 55.99999999999999.
    return max(1, int(choice * num_channels + 1e-6)) if choice > 0 else 0
