"""`SlimPReLU`: a learned slope per active channel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastslim.nn.slim import SlimLayer
from fastslim.ops.segments import check_segments, cut


class SlimPReLU(SlimLayer, nn.PReLU):
    """Drop-in for :class:`torch.nn.PReLU`; with one slope for all channels it takes any width."""

    _plain = nn.PReLU

    def _full_out(self) -> int:
        return self.num_parameters

    def _usual_in(self) -> int:
        return self.active_out

    def forward(self, x: Tensor) -> Tensor:
        """``max(0, x) + slope * min(0, x)`` for ``(N, c, ...)``."""
        return F.prelu(x, self._active(x.shape[1] if x.dim() > 1 else 1))

    def _active(self, channels: int) -> Tensor:
        if self.num_parameters == 1:
            return self.weight
        segments = check_segments(type(self).__name__, self.segments, channels, self.num_parameters)
        return cut(self.weight, 0, segments, channels)

    def _input_channels(self, segments: Any, asked: int | None) -> int:
        return 1 if self.num_parameters == 1 else super()._input_channels(segments, asked)

    def _at_width(self, channels: int) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
        return dict(num_parameters=channels), dict(weight=self._active(channels))
