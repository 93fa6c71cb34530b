"""`SlimLinear`: a `torch.nn.Linear` that runs at any width without copying its weight."""

from __future__ import annotations

from torch import Tensor, nn

from fastslim.nn.slim import SlimLayer
from fastslim.ops.slim_linear import slim_linear


class SlimLinear(SlimLayer, nn.Linear):
    """Drop-in for :class:`torch.nn.Linear`: same constructor, same state_dict, same numbers at full width."""

    _plain = nn.Linear

    def _full_out(self) -> int:
        return self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(*, c_in)`` to ``(*, active_out)``."""
        return slim_linear(x, self.weight, self.bias, c_out=self.active_out, segments=self.segments)
