"""`MutableChannelUnit`: a unit with a choice, and layers that ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastslim.errors import FastslimValueError
from fastslim.mutators.channel import check_channels
from fastslim.mutators.channel_unit import ChannelUnit
from fastslim.mutators.mutable_channel import SquentialMutableChannel
from fastslim.mutators.mutable_container import MutableChannelContainer, register_channel_containers
from fastslim.mutators.swap import swap_named
from fastslim.nn import SlimLayer


class MutableChannelUnit(ChannelUnit):
    """A unit with a choice, which all its layers follow.

    Args:
        num_channels: full width.
        **kwargs: as for `ChannelUnit`.
    """

    #: Slim classes by torch class, where layers shall not become the usual ones.
    layer_types: Mapping[type[nn.Module], type[SlimLayer]] = {}
    mutable_channel: SquentialMutableChannel

    @classmethod
    def init_from_cfg(cls, model: Any, config: Mapping[str, Any]) -> Any:
        """The unit that `config_template` described, with its choice; see `ChannelUnit.init_from_cfg`."""
        unit = super().init_from_cfg(model, config)
        if "choice" in config:
            unit.current_choice = config["choice"]
        return unit

    @staticmethod
    def _register_channel_container(
        model: nn.Module, container_class: type[MutableChannelContainer] = MutableChannelContainer
    ) -> None:
        """MMRazor's name of `register_channel_containers`, which models with dynamic layers call."""
        register_channel_containers(model, container_class)

    @property
    def is_mutable(self) -> bool:
        """Whether some layer makes and some layer reads these channels, and all can run with fewer of them."""
        related = (self.input_related, self.output_related)
        return all(side and all(channel.is_mutable for channel in side) for side in related) and all(
            any(isinstance(channel.module, SlimLayer) for channel in side) for side in related
        )

    def check_channels(self, model: nn.Module) -> None:
        """Raises FastslimValueError when the unit's channels are those of another model."""
        for side in (self.input_related, self.output_related):
            check_channels(self.name, side, model)
            for channel in side:
                if channel.num_channels % self.num_channels:
                    raise FastslimValueError(
                        f"{channel} of unit {self.name!r} has no multiple of the unit's {self.num_channels} channels: "
                        "is the config of another model?"
                    )

    def prepare_for_pruning(self, model: nn.Module) -> None:
        """Lets the listed layers of a model follow this unit, without a trace of the model.

        Layers become slim ones with the same weights. Networks with a `ChannelMutator` need no such call, and run
        faster: there the layers are told their width instead of asking for it.

        Args:
            model: whose layers the unit's channels name. The unit stays full where one of them follows no mutables.

        Raises:
            FastslimValueError: the model does not have these layers or channels.
        """
        channels = [*self.input_related, *self.output_related]
        self.check_channels(model)
        swap_named(model, [channel.name for channel in channels if channel.module is not None], self.layer_types)
        register_channel_containers(model)
        for channel in channels:
            channel.module = None if channel.module is None else model.get_submodule(channel.name)
        if not all(channel.is_mutable for channel in channels):
            return  # the unit stays full
        for channel in channels:
            if not isinstance(channel.module, SlimLayer):
                continue
            entries = channel.num_channels // self.num_channels
            mutable: Any = self.mutable_channel
            MutableChannelContainer.register_mutable_channel_to_module(
                channel.module,
                mutable if entries == 1 else mutable.expand_mutable_channel(entries),
                channel.is_output_channel,
                channel.start,
                channel.end,
            )
