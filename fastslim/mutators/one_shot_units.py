"""Units with a list of widths: to sample from, or one for each of several subnets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastslim.errors import FastslimTypeError, FastslimValueError, nearest
from fastslim.mutators.mutable_channel import number_of_channels
from fastslim.mutators.units import Number, SequentialMutableChannelUnit
from fastslim.nn import SwitchableBatchNorm2d
from fastslim.registry import MODELS


@MODELS.register_module()
class OneShotMutableChannelUnit(SequentialMutableChannelUnit):
    """A unit that may take the listed widths.

    Args:
        num_channels: full width.
        candidate_choices: ratios of the full width (rounded down to whole channels), or numbers of channels. They are
            rounded to `divisor` and clipped to the layer; what becomes equal is kept once, so that sampling stays
            even. An empty list leaves the full width.
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
        min_value: int | None = 1,
        min_ratio: float = 0.9,
        **kwargs: Any,
    ) -> None:
        mode = kwargs.get("candidate_mode") or choice_mode
        if isinstance(candidate_choices, (str, bytes)) or not isinstance(candidate_choices, Sequence):
            raise FastslimTypeError(f"candidate_choices must be a list of numbers, got {candidate_choices!r}")
        for choice in candidate_choices:
            if isinstance(choice, bool) or not isinstance(choice, (int, float)) or not choice > 0:
                raise FastslimValueError(f"candidate_choices holds {choice!r}; positive numbers are needed")
            if mode == "ratio" and choice > 1:
                raise FastslimValueError(
                    f"candidate_choices holds {choice!r}, above the full width; use ratios up to "
                    "1.0, or choice_mode='number'"
                )
            if mode == "number" and choice != int(choice):
                raise FastslimValueError(
                    f"candidate_choices holds {choice!r}, which is no number of channels; use choice_mode='ratio'"
                )
        self._ratios = tuple(candidate_choices) if mode == "ratio" else ()
        if type(num_channels) is int:
            listed = [self._channels_at(num_channels, c) if mode == "ratio" else int(c) for c in candidate_choices]
            self._listed = listed or [num_channels]
        super().__init__(num_channels, choice_mode, divisor, min_value, min_ratio, **kwargs)

    def _channels_at(self, num_channels: int, ratio: float) -> int:
        """The channels that a listed ratio means, before they are rounded to the divisor."""
        return number_of_channels(float(ratio), num_channels, "the unit")

    def _asked_widths(self) -> Sequence[float]:
        return self._listed

    def _meant(self, choice: Number) -> int:
        if isinstance(choice, int):
            return choice  # a number of channels must be one of the widths
        exact = choice * self.num_channels if choice <= 1 else choice
        for width in self.candidate_widths:
            if abs(width - exact) < 1e-6 * self.num_channels:
                return width
        # A listed ratio, such as 1/12, stands for what it is rounded to.
        if any(abs(choice - ratio) < 1e-6 for ratio in self._ratios):
            return self.round(self._channels_at(self.num_channels, choice))
        return 0

    def prepare_for_pruning(self, model: nn.Module) -> None:
        """As `MutableChannelUnit.prepare_for_pruning`; the widest choice is set."""
        super().prepare_for_pruning(model)
        self.current_choice = self.max_choice


@MODELS.register_module()
class SlimmableChannelUnit(OneShotMutableChannelUnit):
    """A unit whose n-th listed width belongs to the n-th subnet.

    Args:
        num_channels: full width.
        candidate_choices: one width per subnet; only the full width, when empty.
        choice_mode: "number" or "ratio".
        divisor: see `SequentialMutableChannelUnit`, as for the others.
        min_value: smallest width.
        min_ratio: rounding bound.
        **kwargs: name, spec, candidate_mode.

    Attributes:
        subnet_widths: its width in every subnet, in the listed order, repeats included.
    """

    layer_types = {nn.BatchNorm2d: SwitchableBatchNorm2d}

    def __init__(
        self,
        num_channels: int,
        candidate_choices: Sequence[Number] = (),
        choice_mode: str = "number",
        divisor: int = 1,
        min_value: int | None = 1,
        min_ratio: float = 0.9,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_channels, candidate_choices, choice_mode, divisor, min_value, min_ratio, **kwargs)
        self.subnet_widths = tuple(self.round(width) if self.spec.mutable else num_channels for width in self._listed)

    @property
    def candidate_choices(self) -> list[Number]:
        """The width in every subnet, as the choice mode writes it."""
        return [self.as_choice(width) for width in self.subnet_widths]

    def prepare_for_pruning(self, model: nn.Module) -> None:
        """As for one-shot units; batch norms get statistics for every width."""
        super().prepare_for_pruning(model)
        for channel in (*self.output_related, *self.input_related):
            if isinstance(channel.module, SwitchableBatchNorm2d):
                entries = channel.module.num_features // self.num_channels
                channel.module.init_candidates(width * entries for width in self.candidate_widths)


def unit_type(name: Any) -> type[SequentialMutableChannelUnit]:
    """The unit class that is registered by this name, or the class itself.

    Raises:
        FastslimValueError: when there is none.
        FastslimTypeError: when it is neither a name nor a class.
    """
    if not isinstance(name, (str, type)):
        raise FastslimTypeError(
            "channel_unit_cfg must be a dict, a class of units or its name, or the path of a file, "
            f"got {type(name).__name__}: {name!r}"
        )
    known = MODELS.get(name) if isinstance(name, str) else name
    if not isinstance(known, type) or not issubclass(known, SequentialMutableChannelUnit):
        units = [n for n in MODELS if n.endswith("Unit")]
        raise FastslimValueError(f"no channel unit is called {name!r}; {nearest(str(name), units)}")
    return known
