"""Batch normalisation at any width: one set of statistics for all widths, or one per width."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastslim import errors
from fastslim.nn.slim import SlimLayer
from fastslim.ops.batch_norm_act import batch_norm_act
from fastslim.ops.segments import cut_optional
from fastslim.ops.step_buffers import count_batch


class SlimBatchNorm(SlimLayer):
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
            raise errors.FastslimValueError(
                f"{type(self).__name__} expects {' or '.join(self._input_forms.values())}, got shape {tuple(x.shape)}"
            )
        training = self.training or self.running_mean is None
        if not training and self.calibrated is not None:
            return self._forward_calibrated(x, residual, activation)
        tracks = self.track_running_stats or not self.training
        return batch_norm_act(
            x,
            self.weight,
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


class SwitchableBatchNorm2d(SlimBatchNorm2d):
    """A :class:`SlimBatchNorm2d` with its own scale, shift and statistics for every narrower width.

    Source: Yu et al., Slimmable Neural Networks (ICLR 2019), section 3.2. The layer's own parameters
    serve the full width, so that state_dict keys of a plain model load.

    Args:
        num_features: channels at full width.
        *args: as for :class:`torch.nn.BatchNorm2d`.
        candidates: the widths that get a set of their own.
        **kwargs: as for :class:`torch.nn.BatchNorm2d`.
    """

    def __init__(self, num_features: int, *args, candidates: Iterable[int] = (), **kwargs) -> None:
        super().__init__(num_features, *args, **kwargs)
        self.init_candidates(candidates)

    def _set_full_width(self) -> None:
        super()._set_full_width()
        self.candidate_bn = nn.ModuleDict()

    def init_candidates(self, candidates: Iterable[int]) -> None:
        """Makes a set for every width in `candidates`, started from the full-width one's first channels.

        Raises:
            FastslimValueError: a width beyond the layer.
        """
        for width in sorted(set(candidates)):
            if not 0 < width <= self.num_features:
                raise errors.FastslimValueError(
                    f"candidate width {width} does not fit {self.num_features} channels; "
                    f"choose 1 to {self.num_features}"
                )
            if width == self.num_features or str(width) in self.candidate_bn:
                continue
            bn = SlimBatchNorm2d(width, self.eps, self.momentum, self.affine, self.track_running_stats)
            if self.weight is not None:
                bn = bn.to(self.weight.device, self.weight.dtype)
            with torch.no_grad():
                for name, full in (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)):
                    getattr(bn, name).copy_(full[:width] if full.dim() else full)
            self.candidate_bn[str(width)] = bn.train(self.training)

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str = "none") -> Tensor:
        """``activation(bn_of_this_width(x) + residual)`` for ``(N, c, H, W)``."""
        if x.dim() == 4 and x.shape[1] == self.num_features:
            return super().forward(x, residual, activation)
        bn = self.candidate_bn[str(x.shape[1])] if x.dim() == 4 and str(x.shape[1]) in self.candidate_bn else None
        if bn is None:
            widths = [*map(int, self.candidate_bn), self.num_features]
            raise errors.FastslimValueError(
                f"SwitchableBatchNorm2d has no statistics for an input of shape {tuple(x.shape)}; "
                f"its widths are {sorted(widths)}: list the width in `candidates`"
            )
        return bn(x, residual, activation)

    def to_torch(self, in_channels: int | None = None) -> nn.Module:
        """A plain :class:`torch.nn.BatchNorm2d` with the set of the current width, see :class:`SlimLayer`."""
        width = str(self._input_channels(None, in_channels))
        return self.candidate_bn[width].to_torch() if width in self.candidate_bn else super().to_torch(in_channels)
