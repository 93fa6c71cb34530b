"""`ChannelUnit`: the channels, of several layers, whose number must change together."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from fastslim.errors import FastslimTypeError, FastslimValueError, nearest
from fastslim.mutators.analyzer import ChannelAnalyzer
from fastslim.mutators.channel import Channel
from fastslim.registry import MODELS


class ChannelUnit:
    """Channels that must change together.

    Args:
        num_channels: of each of them, or a fraction where a layer has several entries per channel.
        name: of the unit; by default it is made of the first layer's.

    Attributes:
        output_related: channels of layers that make them.
        input_related: channels of layers that read them.
    """

    def __init__(self, num_channels: int, *, name: str = "") -> None:
        self.num_channels = num_channels
        self.output_related: list[Channel] = []
        self.input_related: list[Channel] = []
        self._name = name

    @classmethod
    def init_from_cfg(cls, model: Any, config: Mapping[str, Any]) -> Any:
        """The unit that `config_template` described.

        Args:
            model: whose layers the config's `channels` name; None, if it has none.
            config: ``init_args``, and perhaps ``channels`` and ``choice``.

        Raises:
            FastslimValueError: unknown keys, or layers that the model does not have.
        """
        known = ("init_args", "channels", "choice")
        for key in config:
            if key not in known:
                raise FastslimValueError(f"the config of a unit has no key {key!r}; {nearest(str(key), known)}")
        unit = cls(**copy.deepcopy(dict(config.get("init_args", {}))))
        for side, is_output in (("input_related", False), ("output_related", True)):
            for entry in config.get("channels", {}).get(side, ()):
                channel = {"start": 0, "end": unit.num_channels, **entry, "is_output_channel": is_output}
                add = unit.add_output_related if is_output else unit.add_input_related
                add(Channel.init_from_cfg(model, channel))
        return unit

    @classmethod
    def init_from_channel_unit(cls, unit: ChannelUnit, args: Mapping[str, Any] | None = None) -> Any:
        """A unit of this class with another one's channels.

        Args:
            unit: the other one.
            args: further arguments.
        """
        made = cls(**{**(args or {}), "num_channels": unit.num_channels})
        made.input_related, made.output_related = list(unit.input_related), list(unit.output_related)
        return made

    @classmethod
    def init_from_channel_analyzer(cls, model: nn.Module, analyzer: Any = None) -> list[Any]:
        """The units of a model.

        Args:
            model: any module; it is left as it was.
            analyzer: a `ChannelAnalyzer`, or its config.
        """
        if isinstance(analyzer, Mapping):
            analyzer = MODELS.build(analyzer)
        found = (analyzer or ChannelAnalyzer()).analyze(model)
        return [cls.init_from_cfg(model, config) for config in found.values()]

    @property
    def name(self) -> str:
        """``{layer}_({start}, {end})_{channels}`` of the first layer, unless it was given."""
        if self._name:
            return self._name
        first = next(iter((*self.output_related, *self.input_related)), None)
        return f"unitx_{self.num_channels}" if first is None else f"{first.name}_{first.index}_{self.num_channels}"

    @name.setter
    def name(self, name: str) -> None:
        self._name = name

    @property
    def alias(self) -> str:
        """The name."""
        return self.name

    def add_output_related(self, channel: Channel) -> None:
        """Adds output channels of a layer, once."""
        self._add(channel, self.output_related, True)

    def add_input_related(self, channel: Channel) -> None:
        """Adds input channels of a layer, once."""
        self._add(channel, self.input_related, False)

    def _add(self, channel: Channel, related: list[Channel], is_output: bool) -> None:
        if not isinstance(channel, Channel) or channel.is_output_channel is not is_output:
            raise FastslimTypeError(f"{'output' if is_output else 'input'} channels are needed, got {channel}")
        if channel not in related:
            related.append(channel)

    def config_template(self, with_init_args: bool = False, with_channels: bool = False) -> dict[str, Any]:
        """A config of this unit, of plain values.

        Args:
            with_init_args: write its own arguments.
            with_channels: write which channels of which layers belong to it.
        """
        config: dict[str, Any] = {}
        if with_init_args:
            config["init_args"] = {"num_channels": self.num_channels}
        if with_channels:
            config["channels"] = {
                side: [channel.config_template() for channel in getattr(self, side)]
                for side in ("input_related", "output_related")
            }
        return config

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"
