"""`SlimLinear`: a `torch.nn.Linear` that runs at any width without copying its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from fastslim.nn.slim import SlimLayer
from fastslim.ops.segments import check_segments, cut, cut_optional
from fastslim.ops.slim_linear import slim_linear


class SlimLinear(SlimLayer, nn.Linear):
    """Drop-in for :class:`torch.nn.Linear`: same constructor, same state_dict, same numbers at full width."""

    _plain = nn.Linear
    accepted_mutable_attrs = frozenset({"in_features", "out_features"})
    attr_mappings: ClassVar[Mapping[str, str]] = {"in_channels": "in_features", "out_channels": "out_features"}

    @property
    def mutable_in_features(self) -> Any:
        """The mutable of the input features, or None."""
        return self.get_mutable_attr("in_features")

    @property
    def mutable_out_features(self) -> Any:
        """The mutable of the output features, or None."""
        return self.get_mutable_attr("out_features")

    def _full_out(self) -> int:
        return self.out_features

    def _full_in(self) -> int:
        return self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(*, c_in)`` to ``(*, active_out)``."""
        if self.out_segments is not None:
            return F.linear(x, *self._active(x.shape[-1]))
        return slim_linear(x, self.weight, self.bias, c_out=self.active_out, segments=self.segments)

    def _active(self, c_in: int) -> tuple[Tensor, Tensor | None]:
        segments = check_segments(type(self).__name__, self.segments, c_in, self.in_features)
        weight = cut(cut(self.weight, 0, self.out_segments, self.active_out), 1, segments, c_in)
        return weight, cut_optional(self.bias, 0, self.out_segments, self.active_out)

    def _at_width(self, channels: int) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
        weight, bias = self._active(channels)
        return dict(in_features=channels, out_features=self.active_out), dict(weight=weight, bias=bias)
