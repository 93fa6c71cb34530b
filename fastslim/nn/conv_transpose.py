"""Transposed convolutions that run at any width, on the active slice of their weight."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fastslim.nn.conv import SlimConvolution
from fastslim.ops.segments import Segments, cut


class SlimTransposedConvolution(SlimConvolution):
    """What transposed convolutions share: their weight is ``(C_in, C_out / groups, ...)``."""

    def _cut_dense(self, segments: Segments | None, c_in: int) -> Tensor:
        return cut(cut(self.weight, 0, segments, c_in), 1, self.out_segments, self.active_out)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Spreads ``(N, c_in, ...)`` or ``(c_in, ...)`` into `active_out` channels.

        Args:
            x: the input.
            output_size: spatial size of the output, where the stride leaves several.
        """
        weight, bias, groups = self._active(self._channels_of(x))
        extra = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, self._spatial, self.dilation
        )
        return self._function(x, weight, bias, self.stride, self.padding, extra, groups, self.dilation)


class SlimConvTranspose1d(SlimTransposedConvolution, nn.ConvTranspose1d):
    """Drop-in for :class:`torch.nn.ConvTranspose1d`."""

    _plain, _spatial, _function = nn.ConvTranspose1d, 1, staticmethod(F.conv_transpose1d)


class SlimConvTranspose2d(SlimTransposedConvolution, nn.ConvTranspose2d):
    """Drop-in for :class:`torch.nn.ConvTranspose2d`."""

    _plain, _spatial, _function = nn.ConvTranspose2d, 2, staticmethod(F.conv_transpose2d)


class SlimConvTranspose3d(SlimTransposedConvolution, nn.ConvTranspose3d):
    """Drop-in for :class:`torch.nn.ConvTranspose3d`."""

    _plain, _spatial, _function = nn.ConvTranspose3d, 3, staticmethod(F.conv_transpose3d)
