"""Layer, group, instance and RMS normalisation at any width: statistics over the active channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastslim import errors
from fastslim.nn.dynamic_mixin import NormalisationMutables
from fastslim.nn.slim import SlimLayer
from fastslim.ops.segments import Segments, check_segments, cut_optional, pieces

Narrow = tuple[dict[str, Any], dict[str, Tensor | None]]


class SlimNormalisation(NormalisationMutables, SlimLayer):
    """What these layers share: as many channels come out as go in, and the input says how many."""

    def _usual_in(self) -> int:
        return self.active_out

    def _checked(self, channels: int) -> Segments | None:
        return check_segments(type(self).__name__, self.segments, channels, self._full_out())

    def _parameters_for(self, channels: int, names: tuple[str, ...] = ("weight", "bias")) -> dict[str, Tensor | None]:
        segments = self._checked(channels)
        return {name: cut_optional(getattr(self, name), 0, segments, channels) for name in names}


class _OverTheLastDimensions(SlimNormalisation):
    """Normalises over the last dimensions; the first of them is the slim one."""

    normalized_shape: tuple[int, ...]

    def _full_out(self) -> int:
        return self.normalized_shape[0]

    def _active_shape(self, x: Tensor) -> tuple[int, ...]:
        dims = len(self.normalized_shape)
        if x.dim() < dims or (x.shape[1 - dims :] != self.normalized_shape[1:] and dims > 1):
            raise errors.FastslimValueError(
                f"{type(self).__name__} normalises over {self.normalized_shape}, of which the first may be narrower; "
                f"the input has shape {tuple(x.shape)}"
            )
        return tuple(x.shape[-dims:])


class SlimLayerNorm(_OverTheLastDimensions, nn.LayerNorm):
    """Drop-in for :class:`torch.nn.LayerNorm`: mean and variance are those of the active channels.

    Of a `normalized_shape` with several dimensions the first is the slim one.
    """

    _plain = nn.LayerNorm

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``(*, c)`` or ``(*, c, *normalized_shape[1:])``."""
        shape = self._active_shape(x)
        return F.layer_norm(x, shape, **self._parameters_for(shape[0]), eps=self.eps)

    def _at_width(self, channels: int) -> Narrow:
        return dict(normalized_shape=(channels, *self.normalized_shape[1:])), self._parameters_for(channels)


class SlimRMSNorm(_OverTheLastDimensions, nn.RMSNorm):
    """Drop-in for :class:`torch.nn.RMSNorm`: the mean square is that of the active channels."""

    _plain = nn.RMSNorm

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``(*, c)`` or ``(*, c, *normalized_shape[1:])``."""
        shape = self._active_shape(x)
        return F.rms_norm(x, shape, **self._parameters_for(shape[0], ("weight",)), eps=self.eps)

    def _at_width(self, channels: int) -> Narrow:
        shape = (channels, *self.normalized_shape[1:])
        return dict(normalized_shape=shape), self._parameters_for(channels, ("weight",))


class SlimGroupNorm(SlimNormalisation, nn.GroupNorm):
    """Drop-in for :class:`torch.nn.GroupNorm` that keeps the size of a group: whole groups are active.

    With a single group, which is layer normalisation of a picture, that group is the active
    channels, however many.
    """

    _plain = nn.GroupNorm

    def _full_out(self) -> int:
        return self.num_channels

    def _check_width(self, out: int) -> None:
        self._groups(((0, out),))

    def _groups(self, segments: Segments) -> int:
        if self.num_groups == 1:
            return 1
        size = self.num_channels // self.num_groups
        if any(value % size for segment in segments for value in segment):
            raise errors.FastslimValueError(f"SlimGroupNorm keeps whole groups of {size} channels; {segments} cut one")
        return sum(count for _, count in segments) // size

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``(N, c, ...)``."""
        if x.dim() < 2:
            raise errors.FastslimValueError(f"SlimGroupNorm expects (N, C, ...), got shape {tuple(x.shape)}")
        parameters = self._parameters_for(x.shape[1])
        return F.group_norm(x, self._groups(self.segments or ((0, x.shape[1]),)), **parameters, eps=self.eps)

    def _at_width(self, channels: int) -> Narrow:
        groups = self._groups(self.segments or ((0, channels),))
        return dict(num_groups=groups, num_channels=channels), self._parameters_for(channels)


class SlimInstanceNorm(SlimNormalisation):
    """What instance normalisation of all dimensions shares."""

    num_features: int
    num_batches_tracked: Tensor | None

    def _full_out(self) -> int:
        return self.num_features

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``(N, c, ...)`` or ``(c, ...)``; running statistics of the active channels are updated."""
        alone = self._get_no_batch_dim()
        if x.dim() not in (alone, alone + 1):
            raise errors.FastslimValueError(
                f"{type(self).__name__} expects {alone} or {alone + 1} dimensions, got shape {tuple(x.shape)}"
            )
        if x.dim() == alone:
            return self._normalise(x.unsqueeze(0)).squeeze(0)
        return self._normalise(x)

    def _normalise(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        segments = self._checked(channels)
        weight, bias, mean, var = (
            cut_optional(vector, 0, segments, channels)
            for vector in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        momentum = 0.0 if self.momentum is None else self.momentum
        y = F.instance_norm(
            x, mean, var, weight, bias, self.training or not self.track_running_stats, momentum, self.eps
        )
        if self.training and segments is not None and mean is not None:  # what was gathered goes back
            with torch.no_grad():
                for start, offset, count in pieces(segments, channels):
                    self.running_mean[start : start + count] = mean[offset : offset + count]
                    self.running_var[start : start + count] = var[offset : offset + count]
        return y

    def _at_width(self, channels: int) -> Narrow:
        tensors = self._parameters_for(channels, ("weight", "bias", "running_mean", "running_var"))
        return dict(num_features=channels), {**tensors, "num_batches_tracked": self.num_batches_tracked}


class SlimInstanceNorm1d(SlimInstanceNorm, nn.InstanceNorm1d):
    """Drop-in for :class:`torch.nn.InstanceNorm1d`."""

    _plain = nn.InstanceNorm1d


class SlimInstanceNorm2d(SlimInstanceNorm, nn.InstanceNorm2d):
    """Drop-in for :class:`torch.nn.InstanceNorm2d`."""

    _plain = nn.InstanceNorm2d


class SlimInstanceNorm3d(SlimInstanceNorm, nn.InstanceNorm3d):
    """Drop-in for :class:`torch.nn.InstanceNorm3d`."""

    _plain = nn.InstanceNorm3d
