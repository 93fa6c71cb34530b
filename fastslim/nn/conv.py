"""Convolutions that run at any width: `SlimConv2d` without copying its weight, 1d and 3d on a slice of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from fastslim import errors
from fastslim.nn.slim import SlimLayer
from fastslim.ops.segments import Segments, check_segments, cut, cut_optional, merged, scaled, total
from fastslim.ops.slim_conv2d import slim_conv2d


class SlimConvolution(SlimLayer):
    """What convolutions of all dimensions share, transposed ones too.

    With groups, a choice of whole *groups* is active and every group keeps its size: the width
    follows from the input unless one was chosen; then the two must agree.
    """

    accepted_mutable_attrs = frozenset({"in_channels", "out_channels"})
    _spatial: ClassVar[int]
    _function: ClassVar[Callable[..., Tensor]]
    in_channels: int
    out_channels: int
    groups: int
    padding: str | tuple[int, ...]

    def _full_out(self) -> int:
        return self.out_channels

    def _full_in(self) -> int:
        return self.in_channels

    def _static_inputs(self) -> int | None:
        if self.groups == 1 or self.segments is not None:
            return None
        return self.active_out * self.groups // self.out_channels * (self.in_channels // self.groups)

    def _check_width(self, out: int) -> None:
        if self.groups > 1 and out % (self.out_channels // self.groups):
            raise errors.FastslimValueError(
                f"out={out} cuts a group: this convolution keeps whole groups of "
                f"{self.out_channels // self.groups} output channels"
            )

    def _channels_of(self, x: Tensor) -> int:
        if x.dim() not in (self._spatial + 1, self._spatial + 2):
            sizes = ", ".join(("C", "D", "H", "W") if self._spatial == 3 else ("C", "H", "W")[: self._spatial + 1])
            raise errors.FastslimValueError(
                f"{type(self).__name__}: the input must be (N, {sizes}) or ({sizes}), got shape {tuple(x.shape)}"
            )
        return x.shape[-1 - self._spatial]

    def _active(self, c_in: int) -> tuple[Tensor, Tensor | None, int]:
        """Weight, bias and groups that an input of `c_in` channels meets."""
        if self.groups == 1:
            segments = check_segments(type(self).__name__, self.segments, c_in, self.in_channels)
            bias = cut_optional(self.bias, 0, self.out_segments, self.active_out)
            return self._cut_dense(segments, c_in), bias, 1
        groups, kept = self._active_groups(c_in)
        rows = self.weight.shape[0] // self.groups
        width = self.out_channels // self.groups
        weight = cut(self.weight, 0, scaled(kept, rows), groups * rows)
        return weight, cut_optional(self.bias, 0, scaled(kept, width), groups * width), groups

    def _cut_dense(self, segments: Segments | None, c_in: int) -> Tensor:
        return cut(cut(self.weight, 0, self.out_segments, self.active_out), 1, segments, c_in)

    def _active_groups(self, c_in: int) -> tuple[int, Segments | None]:
        """How many groups are active and which, told by the input, its segments and the chosen outputs."""
        name = type(self).__name__
        size, width = self.in_channels // self.groups, self.out_channels // self.groups
        segments = check_segments(name, self.segments, c_in, self.in_channels)
        groups = c_in // size
        kept = self._whole_groups(segments if segments is not None else ((0, c_in),), size, "input")
        if self.active_out not in (self.out_channels, groups * width):
            raise errors.FastslimValueError(
                f"{name}: {groups} of {self.groups} groups are active and give {groups * width} output channels, "
                f"not {self.active_out}; narrow or widen the layer before it"
            )
        if self.out_segments is not None:
            chosen = self._whole_groups(self.out_segments, width, "output")
            if total(chosen) != groups or (self.segments is not None and merged(chosen) != merged(kept)):
                raise errors.FastslimValueError(
                    f"{name}: input channels {segments or ((0, c_in),)} and output channels {self.out_segments} are "
                    "not those of the same groups"
                )
            kept = chosen
        return groups, merged(kept)

    def _whole_groups(self, segments: Segments, size: int, side: str) -> Segments:
        if any(value % size for segment in segments for value in segment):
            raise errors.FastslimValueError(
                f"{type(self).__name__}: a grouped convolution keeps whole groups of {size} {side} channels; "
                f"{segments} cut one"
            )
        return tuple((start // size, count // size) for start, count in segments)

    def _convolve(self, x: Tensor) -> Tensor:
        """Plain torch on the active slice of the weight."""
        weight, bias, groups = self._active(self._channels_of(x))
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * self._spatial
        return self._function(x, weight, bias, self.stride, padding, self.dilation, groups)

    def _at_width(self, channels: int) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
        weight, bias, groups = self._active(channels)
        out = self.active_out if groups == 1 and self.groups == 1 else groups * (self.out_channels // self.groups)
        return dict(in_channels=channels, out_channels=out, groups=groups), dict(weight=weight, bias=bias)


class SlimConv1d(SlimConvolution, nn.Conv1d):
    """Drop-in for :class:`torch.nn.Conv1d`, see :class:`SlimConv2d`."""

    _plain, _spatial, _function = nn.Conv1d, 1, staticmethod(F.conv1d)

    def forward(self, x: Tensor) -> Tensor:
        """Convolves ``(N, c_in, L)`` or ``(c_in, L)`` into `active_out` channels."""
        return self._convolve(x)


class SlimConv2d(SlimConvolution, nn.Conv2d):
    """Drop-in for :class:`torch.nn.Conv2d`: same constructor, same state_dict, same numbers at full width.

    The input may have fewer channels than the layer; :meth:`set_width` chooses how many it gives out.

    Example:
        >>> conv = SlimConv2d(64, 128, 3, padding=1)
        >>> conv.set_width(out=24)
        >>> conv(torch.randn(1, 16, 8, 8)).shape
        torch.Size([1, 24, 8, 8])
    """

    _plain, _spatial, _function = nn.Conv2d, 2, staticmethod(F.conv2d)

    def forward(self, x: Tensor) -> Tensor:
        """Convolves ``(N, c_in, H, W)`` into ``(N, active_out, H_out, W_out)``; an image alone works, too."""
        segments = self.segments
        if self.out_segments is not None or x.dim() == 3:
            if self.groups == 1 or x.dim() == 3:
                return self._convolve(x)
            kept = self._active_groups(self._channels_of(x))[1]
            segments = scaled(kept, self.in_channels // self.groups)
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
            segments=segments,
        )

    def _pad_same(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """padding="same" or "valid" as numbers; the odd pixel goes to the right and the bottom, as in torch."""
        if self.padding == "valid":
            return x, (0, 0)
        totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if any(total % 2 for total in totals):
            x = F.pad(x, (0, totals[1] % 2, 0, totals[0] % 2))
        return x, (totals[0] // 2, totals[1] // 2)


class SlimConv3d(SlimConvolution, nn.Conv3d):
    """Drop-in for :class:`torch.nn.Conv3d`, see :class:`SlimConv2d`."""

    _plain, _spatial, _function = nn.Conv3d, 3, staticmethod(F.conv3d)

    def forward(self, x: Tensor) -> Tensor:
        """Convolves ``(N, c_in, D, H, W)`` or ``(c_in, D, H, W)`` into `active_out` channels."""
        return self._convolve(x)
