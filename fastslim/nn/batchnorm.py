"""Batch normalisation at any width, with one set of statistics for all widths."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastslim import errors
from fastslim.nn.dynamic_mixin import NormalisationMutables
from fastslim.nn.slim import SlimLayer
from fastslim.ops.batch_norm_act import batch_norm_act
from fastslim.ops.segments import check_segments, cut_optional, pieces
from fastslim.ops.step_buffers import count_batch


class SlimBatchNorm(NormalisationMutables, SlimLayer):
    """What batch normalisation of all dimensions shares.

    The width is the input's. Scale, shift and running statistics of the active channels are used
    and updated in place. An activation and a residual can be fused into the call.
    """

    _width_state = (*SlimLayer._width_state, "calibrated")
    _input_forms: ClassVar[dict[int, str]]
    num_features: int
    momentum: float | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    #: ``(mean, var)`` of the active channels, calibrated for the current subnet; used in evaluation
    #: in the place of the running statistics. Not part of the state_dict.
    calibrated: tuple[Tensor, Tensor] | None = None

    def _full_out(self) -> int:
        return self.num_features

    def _usual_in(self) -> int:
        return self.active_out

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str = "none") -> Tensor:
        """``activation(bn(x) + residual)`` for an input of `c` channels, ``(N, c, ...)``."""
        if x.dim() not in self._input_forms:
            raise self._shape_error(x)
        training = self.training or self.running_mean is None
        if not training and self.calibrated is not None:
            return self._forward_calibrated(x, residual, activation)
        tracks = self.track_running_stats or not self.training
        weight = self.weight
        if weight is None and self.running_mean is None and residual is None and activation == "none":
            return self._normalise(x)  # nothing of it depends on the width: torch's own
        return batch_norm_act(
            x,
            weight,
            self.bias,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            training=training,
            momentum=self._average_factor(),
            eps=self.eps,
            activation=activation,
            residual=residual,
            segments=self.segments,
        )

    def _shape_error(self, x: Tensor) -> errors.FastslimValueError:
        return errors.FastslimValueError(
            f"{type(self).__name__} expects {' or '.join(self._input_forms.values())}, got shape {tuple(x.shape)}"
        )

    def _normalise(self, x: Tensor) -> Tensor:
        """Torch's own batch normalisation with the parameters and statistics of the active channels."""
        if x.dim() not in self._input_forms:
            raise self._shape_error(x)
        channels = x.shape[1]
        segments = check_segments(type(self).__name__, self.segments, channels, self.num_features)
        weight, bias, mean, var = (
            cut_optional(vector, 0, segments, channels)
            for vector in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        training, factor = self.training or mean is None, self._average_factor()
        if self.training and not self.track_running_stats:
            mean = var = None
        y = F.batch_norm(x, mean, var, weight, bias, training, factor, self.eps)
        if training and segments is not None and mean is not None and var is not None:  # what was gathered goes back
            with torch.no_grad():
                for start, offset, count in pieces(segments, channels):
                    self.running_mean[start : start + count] = mean[offset : offset + count]
                    self.running_var[start : start + count] = var[offset : offset + count]
        return y

    def _forward_following(self, x: Tensor, residual: Tensor | None = None, activation: str = "none") -> Tensor:
        """Torch's kernel, whose last bits differ from ours, so that the static layer gives exactly the same."""
        fused = residual is not None or activation != "none"
        if fused or (self.calibrated is not None and not self.training):
            return type(self).forward(self, x, residual, activation)
        return self._normalise(x)

    def register_mutable_attr(self, attr: str, mutable: Any) -> None:
        """See :meth:`DynamicMixin.register_mutable_attr`.

        Raises:
            FastslimRuntimeError: a layer with neither parameters nor statistics has nothing to choose from.
        """
        if not self.affine and not self.track_running_stats:
            raise errors.FastslimRuntimeError(
                f"this {type(self).__name__} has neither parameters nor statistics and takes any width as it is; "
                "leave the mutable away"
            )
        super().register_mutable_attr(attr, mutable)

    def _get_num_features_mask(self) -> Tensor:
        """Which of the channels are active, as MMRazor's layers tell it."""
        mutable = self.mutable_num_features
        if mutable is None:
            return torch.ones(self.num_features, dtype=torch.bool)
        mask: Tensor = mutable.current_mask
        return mask.bool()

    def _average_factor(self) -> float:
        """Torch's exponential average factor; counts the batch."""
        if not (self.training and self.track_running_stats and self.num_batches_tracked is not None):
            return 0.0 if self.momentum is None else self.momentum
        if self.momentum is not None:
            count_batch(self.num_batches_tracked)
            return self.momentum
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked)  # waits for a GPU, as in torch

    def _forward_calibrated(self, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        mean, var = self._calibrated_for(x.shape[1])
        return batch_norm_act(
            x,
            cut_optional(self.weight, 0, self.segments, x.shape[1]),
            cut_optional(self.bias, 0, self.segments, x.shape[1]),
            mean,
            var,
            training=False,
            momentum=0.0,
            eps=self.eps,
            activation=activation,
            residual=residual,
            segments=None,
        )

    def _calibrated_for(self, channels: int) -> tuple[Tensor, Tensor]:
        mean, var = self.calibrated
        if len(mean) != channels:
            raise errors.FastslimValueError(
                f"calibrated for {len(mean)} channels, but the input has {channels}; choose widths with "
                "AutoSlim.set_subnet, which selects the statistics too"
            )
        return mean, var

    def _at_width(self, channels: int) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
        names = ("weight", "bias", "running_mean", "running_var")
        tensors = {name: cut_optional(getattr(self, name), 0, self.segments, channels) for name in names}
        tensors["num_batches_tracked"] = self.num_batches_tracked
        if self.calibrated is not None:
            tensors["running_mean"], tensors["running_var"] = self._calibrated_for(channels)
        return dict(num_features=channels), tensors


class SlimBatchNorm1d(SlimBatchNorm, nn.BatchNorm1d):
    """Drop-in for :class:`torch.nn.BatchNorm1d`, see :class:`SlimBatchNorm2d`."""

    _plain = nn.BatchNorm1d
    _input_forms = {2: "(N, C)", 3: "(N, C, L)"}


class SlimBatchNorm2d(SlimBatchNorm, nn.BatchNorm2d):
    """Drop-in for :class:`torch.nn.BatchNorm2d` whose input may have fewer channels than the layer.

    The width is the input's. Scale, shift and running statistics of the active channels are used
    and updated in place. An activation and a residual can be fused into the call.
    """

    _plain = nn.BatchNorm2d
    _input_forms = {4: "(N, C, H, W)"}


class SlimBatchNorm3d(SlimBatchNorm, nn.BatchNorm3d):
    """Drop-in for :class:`torch.nn.BatchNorm3d`, see :class:`SlimBatchNorm2d`."""

    _plain = nn.BatchNorm3d
    _input_forms = {5: "(N, C, D, H, W)"}
