"""`SlimConv2d`: a `torch.nn.Conv2d` that runs at any width without copying its weight."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fastslim import errors
from fastslim.nn.slim import SlimLayer
from fastslim.ops.slim_conv2d import slim_conv2d


class SlimConv2d(SlimLayer, nn.Conv2d):
    """Drop-in for :class:`torch.nn.Conv2d`: same constructor, same state_dict, same numbers at full width.

    The input may have fewer channels than the layer; :meth:`set_width` chooses how many it gives out.

    Example:
        >>> conv = SlimConv2d(64, 128, 3, padding=1)
        >>> conv.set_width(out=24)
        >>> conv(torch.randn(1, 16, 8, 8)).shape
        torch.Size([1, 24, 8, 8])
    """

    _plain = nn.Conv2d

    def _full_out(self) -> int:
        return self.out_channels

    def _check_width(self, out: int) -> None:
        if self.groups > 1 and out % (self.out_channels // self.groups):
            raise errors.FastslimValueError(
                f"out={out} cuts a group: this convolution keeps whole groups of "
                f"{self.out_channels // self.groups} output channels"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Convolves ``(N, c_in, H, W)`` into ``(N, active_out, H_out, W_out)``."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        elif isinstance(padding, str):
            x, padding = self._pad_same(x)
        return slim_conv2d(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            # A grouped layer's width follows from its input unless one was chosen; then the two must agree.
            c_out=None if self.groups > 1 and self.active_out == self.out_channels else self.active_out,
            segments=self.segments,
        )

    def _pad_same(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """padding="same" or "valid" as numbers; the odd pixel goes to the right and the bottom, as in torch."""
        if self.padding == "valid":
            return x, (0, 0)
        totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if any(total % 2 for total in totals):
            x = F.pad(x, (0, totals[1] % 2, 0, totals[0] % 2))
        return x, (totals[0] // 2, totals[1] // 2)
