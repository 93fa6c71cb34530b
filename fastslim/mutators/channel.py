"""`Channel`: a range of one layer's channels, as a unit lists it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fastslim.errors import FastslimValueError, nearest
from fastslim.graph import Trace
from fastslim.nn import DynamicChannelMixin


class Channel:
    """A range of a layer's input or output channels.

    Args:
        name: of the layer in its model.
        module: the layer; None for what is no module of the model.
        index: first channel, and the one after the last.
        node: accepted for MMRazor's sake.
        is_output_channel: whether they are output channels.
    """

    def __init__(
        self,
        name: str,
        module: Any,
        index: tuple[int, int],
        node: Any = None,
        is_output_channel: bool = True,
    ) -> None:
        self.name, self.module, self.node, self.is_output_channel = name, module, node, is_output_channel
        self.index = (index[0], index[1])

    @classmethod
    def init_from_cfg(cls, model: nn.Module, config: Mapping[str, Any]) -> Channel:
        """The channel that `config_template` described."""
        module = dict(model.named_modules()).get(config["name"]) if config["name"] else None
        return cls(
            config["name"], module, (config["start"], config["end"]), is_output_channel=config["is_output_channel"]
        )

    def config_template(self) -> dict[str, Any]:
        """Plain values that `init_from_cfg` takes back."""
        return dict(name=self.name, start=self.start, end=self.end, is_output_channel=self.is_output_channel)

    @property
    def start(self) -> int:
        """The first channel."""
        return self.index[0]

    @property
    def end(self) -> int:
        """The one after the last channel."""
        return self.index[1]

    @property
    def num_channels(self) -> int:
        """How many there are."""
        return self.end - self.start

    @property
    def is_mutable(self) -> bool:
        """Whether the layer can run with fewer of them."""
        if self.module is None:
            return self.name not in ("input_placeholder", "output_placeholder")
        if isinstance(self.module, DynamicChannelMixin):
            return bool(self.module.accepted_mutable_attrs)
        return not any(True for _ in self.module.parameters())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Channel):
            return NotImplemented
        own, others = ((c.name, c.index, c.is_output_channel, c.node) for c in (self, other))
        return own == others and self.module is other.module

    __hash__ = None

    def __repr__(self) -> str:
        return f"Channel({self.name}, index={self.index}, is_output_channel={self.is_output_channel})"


def related_channels(trace: Trace) -> list[tuple[list[Channel], list[Channel]]]:
    """The input and the output channels that belong to each unit of a trace, in the order of the layers."""
    related: list[tuple[list[Channel], list[Channel]]] = [([], []) for _ in trace.units]
    modules = dict(trace.model.named_modules(remove_duplicate=False))
    for name, layer in trace.layers.items():
        for dims, is_output in ((layer.input_dim, False), (layer.out, True), (layer.heads, True)):
            start = 0
            for unit, channels in dims:
                if unit is not None:
                    index = (start, start + channels)
                    related[unit][is_output].append(Channel(name, modules[name], index, is_output_channel=is_output))
                start += channels
    return related


def check_channels(unit: str, channels: Sequence[Channel], model: nn.Module) -> None:
    """Refuses channels, from a config, of another model.

    MMRazor's configs name functions such as ``flatten``, too; what is no path of a module is taken for one.

    Raises:
        FastslimValueError: the model lacks their layers, or these have fewer channels.
    """
    modules = dict(model.named_modules())
    missing = [channel.name for channel in channels if channel.name not in modules]
    named = [name for name in missing if "." in name] or (missing if len(missing) == len(channels) else [])
    if named and named != ["output_placeholder"]:
        raise FastslimValueError(
            f"unit {unit!r} has channels of a layer {named[0]!r}, which this model does not have "
            f"({nearest(named[0], modules)}): is the config of another model?"
        )
    for channel in channels:
        full = _size(modules.get(channel.name), channel.is_output_channel)
        if not 0 <= channel.start < channel.end or (full is not None and channel.end > full):
            raise FastslimValueError(
                f"unit {unit!r} has channels {channel.start} to {channel.end} of {channel.name!r}, which has {full}; "
                "is the config of another model?"
            )


def _size(module: nn.Module | None, is_output: bool) -> int | None:
    """Output or input channels of a layer, where it says them."""
    side = "out" if is_output else "in"
    for name in (f"{side}_channels", f"{side}_features", "num_features", "num_channels"):
        size = getattr(module, name, None)
        if isinstance(size, int):
            return size
    return None
