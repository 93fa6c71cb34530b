"""`MutableChannelContainer`: the mutables of several ranges of one layer's channels, side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastslim.errors import FastslimRuntimeError, FastslimTypeError, FastslimValueError
from fastslim.mutators.mutable_channel import BaseMutableChannel
from fastslim.nn import DynamicChannelMixin, active_segments
from fastslim.registry import MODELS

Range = tuple[int, int]


@MODELS.register_module()
class MutableChannelContainer(BaseMutableChannel):
    """Channels of a layer that several mutables share; what none is registered for is active.

    Args:
        num_channels: of the full layer.
        **kwargs: alias, init_cfg.

    Attributes:
        mutable_channels: the mutables by their range ``(start, end)``.
    """

    is_composite = True

    def __init__(self, num_channels: int, **kwargs: Any) -> None:
        super().__init__(num_channels, **kwargs)
        self.mutable_channels: dict[Range, Any] = {}

    def register_mutable(self, mutable_channel: Any, start: int, end: int) -> None:
        """Gives the channels from `start` up to `end` to a mutable of as many channels.

        Raises:
            FastslimValueError: the range does not fit the layer, the mutable or another range.
        """
        if not 0 <= start < end <= self.num_channels:
            raise FastslimValueError(f"channels {start} to {end} do not fit {self.num_channels}")
        size = len(mutable_channel.current_mask)
        if size != end - start:
            raise FastslimValueError(f"a mutable of {size} channels does not fit channels {start} to {end}")
        for own in self.mutable_channels:
            if own != (start, end) and own[0] < end and start < own[1]:
                raise FastslimValueError(f"channels {start} to {end} overlap {own[0]} to {own[1]}, which are taken")
        self.mutable_channels[start, end] = mutable_channel
        self.mutable_channels = dict(sorted(self.mutable_channels.items()))

    @classmethod
    def register_mutable_channel_to_module(
        cls, module: Any, mutable: Any, is_to_output_channel: bool = True, start: int = 0, end: int = -1
    ) -> None:
        """Gives a range of a layer's channels to a mutable.

        Args:
            module: a layer with containers, see `register_channel_containers`.
            mutable: chooses the channels.
            is_to_output_channel: output or input channels.
            start: the first channel.
            end: the channel after the last one; by default as many as the mutable has.

        Raises:
            FastslimTypeError: the layer has no container there.
        """
        end = start + len(mutable.current_mask) if end == -1 else end
        attr = "out_channels" if is_to_output_channel else "in_channels"
        container = module.get_mutable_attr(attr)
        if not isinstance(container, MutableChannelContainer):
            raise FastslimTypeError(
                f"the {attr} of this {type(module).__name__} have no container; call register_channel_containers first"
            )
        container.register_mutable(mutable, start, end)

    @property
    def current_choice(self) -> Tensor:
        """The mask."""
        return self.current_mask

    @current_choice.setter
    def current_choice(self, choice: Any) -> None:
        raise FastslimRuntimeError("a container has no choice of its own; set those of its mutable_channels")

    @property
    def current_mask(self) -> Tensor:
        """The masks of all ranges, one after the other."""
        mask = torch.ones(self.num_channels, dtype=torch.bool)
        for (start, end), mutable in self.mutable_channels.items():
            mask[start:end] = mutable.current_mask
        return mask

    def active_segments(self) -> tuple[Range, ...]:
        """The active channels as ``(start, count)`` ranges."""
        segments: list[Range] = []
        reached = 0
        for (start, end), mutable in self.mutable_channels.items():
            if reached < start:
                segments.append((reached, start - reached))
            segments.extend((start + first, count) for first, count in active_segments(mutable))
            reached = end
        if reached < self.num_channels:
            segments.append((reached, self.num_channels - reached))
        return tuple(segments)

    @property
    def is_fixed(self) -> bool:
        """Whether all registered mutables are."""
        return all(mutable.is_fixed for mutable in self.mutable_channels.values())

    @is_fixed.setter
    def is_fixed(self, is_fixed: bool) -> None:
        raise FastslimRuntimeError("a container is fixed when its mutable_channels are; fix those")

    def fix_chosen(self, chosen: Any = None) -> None:
        """Does nothing: the registered mutables are what can be fixed."""


def register_channel_containers(
    model: Any, container_class: type[MutableChannelContainer] = MutableChannelContainer
) -> None:
    """Gives every slim layer of a model that has no mutables yet containers for its input and output channels."""
    for module in model.modules():
        if isinstance(module, DynamicChannelMixin) and module.accepted_mutable_attrs:
            sizes = {"in_channels": module._full_in(), "out_channels": module._full_out()}  # type: ignore[attr-defined]
            for attr, size in sizes.items():
                if module.get_mutable_attr(attr) is None and not _stores_nothing(module):
                    module.register_mutable_attr(attr, container_class(size))


def _stores_nothing(module: Any) -> bool:
    return not getattr(module, "affine", True) and not getattr(module, "track_running_stats", True)
