"""A unit that keeps its most important channels, wherever they are, in the place of the first ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastslim.mutators.mutable_channel import SquentialMutableChannel
from fastslim.mutators.units import SequentialMutableChannelUnit
from fastslim.nn import runs
from fastslim.registry import MODELS


class RankedMutableChannel(SquentialMutableChannel):
    """The most important channels, however many.

    Args:
        num_channels: of the full layer.
        choice_mode: see `SequentialMutableChannel`.
        **kwargs: alias, init_cfg.

    Attributes:
        order: all channels, the most important first; None for the order they have.
    """

    def __init__(self, num_channels: int, choice_mode: str = "number", **kwargs: Any) -> None:
        super().__init__(num_channels, choice_mode, **kwargs)
        self.order: list[int] | None = None

    def active_segments(self) -> tuple[tuple[int, int], ...]:
        """The active channels as ranges."""
        if self.order is None:
            return super().active_segments()
        mask = torch.zeros(self.num_channels, dtype=torch.bool)
        mask[self.order[: self.width]] = True
        return runs(mask)


@MODELS.register_module()
class L1MutableChannelUnit(SequentialMutableChannelUnit):
    """A sequential unit whose choice keeps the channels with the largest weights, as they are when it is made.

    The layers ask for their channels, so that there are no fused passes and no costs: to train one network at many
    widths, order the channels once with `sort_channels` and use the other units. Importance is the mean absolute
    weight of a channel, averaged over the layers that make it.
    Source: Li et al., Pruning Filters for Efficient ConvNets (2017).

    Args:
        num_channels: full width.
        choice_mode: see `SequentialMutableChannelUnit`, as for the others.
        divisor: widths are multiples of it.
        min_value: smallest width.
        min_ratio: rounding bound.
        **kwargs: name, spec, candidate_mode.
    """

    picks_channels = True
    mutable_channel_class = RankedMutableChannel

    @property
    def width(self) -> int:
        """Active channels now; assigning chooses the most important ones."""
        return self.mutable_channel.width

    @width.setter
    def width(self, width: int) -> None:
        importance = self.importance()
        self.mutable_channel.__dict__["width"] = width
        if importance is not None and isinstance(self.mutable_channel, RankedMutableChannel):
            steps = self.spec.granularity
            first = importance.view(-1, steps).sum(1).argsort(descending=True, stable=True) * steps
            self.mutable_channel.order = (first[:, None] + torch.arange(steps)).flatten().tolist()

    @torch.no_grad()
    def importance(self) -> Tensor | None:
        """Mean absolute weight of every channel; None when no convolution or linear layer makes them."""
        found: list[Tensor] = []
        for channel in self.output_related:
            layer = channel.module
            if isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)) and not getattr(layer, "transposed", False):
                norms = self._get_l1_norm(layer, channel.start, channel.end)
                found.append(norms.reshape(self.num_channels, -1).mean(1))
        return torch.stack(found).mean(0) if found else None

    @staticmethod
    def _get_l1_norm(layer: Any, start: int, end: int) -> Tensor:
        """Mean absolute weight of output channels, by MMRazor's name for it."""
        norms: Tensor = layer.weight[start:end].detach().abs().double().flatten(1).mean(1).cpu()
        return norms
