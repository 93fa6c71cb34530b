"""Batch normalisation with one set of statistics per width, or per subnet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastslim import errors
from fastslim.nn.batchnorm import SlimBatchNorm2d


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
            if not isinstance(width, int) or not 0 < width <= self.num_features:
                raise errors.FastslimValueError(
                    f"candidate width {width!r} does not fit {self.num_features} channels; "
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

    def _forward_following(self, x: Tensor, residual: Tensor | None = None, activation: str = "none") -> Tensor:
        own = self.candidate_bn[str(x.shape[1])] if x.dim() == 4 and str(x.shape[1]) in self.candidate_bn else None
        if own is not None:
            y: Tensor = own._forward_following(x, residual, activation)
            return y
        if x.dim() == 4 and x.shape[1] == self.num_features:
            return super()._forward_following(x, residual, activation)
        return type(self).forward(self, x, residual, activation)

    def to_torch(self, in_channels: int | None = None) -> nn.Module:
        """A plain :class:`torch.nn.BatchNorm2d` with the set of the current width, see :class:`SlimLayer`."""
        width = str(self._input_channels(None, in_channels))
        return self.candidate_bn[width].to_torch() if width in self.candidate_bn else super().to_torch(in_channels)


class IndexedBatchNorm2d(SlimBatchNorm2d):
    """A :class:`SlimBatchNorm2d` with a full-width set for every listed subnet, of which `index` chooses one.

    MMRazor 0.x switches this way between the subnets it trains together. The layer's own parameters are the first set,
    so that state_dict keys of a plain model load; the others start as copies of it.

    Args:
        num_features: channels at full width.
        num_bns: how many sets there are.
        **kwargs: as for :class:`torch.nn.BatchNorm2d`.

    Attributes:
        index: the set in use.
    """

    _width_state = (*SlimBatchNorm2d._width_state, "index")

    def __init__(self, num_features: int, num_bns: int = 1, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        self.init_sets(num_bns)

    def _set_full_width(self) -> None:
        super()._set_full_width()
        self.index = 0
        self.further_bns = nn.ModuleList()

    def init_sets(self, num_bns: int) -> None:
        """Makes all but the first set.

        Raises:
            FastslimValueError: for no positive number.
        """
        if isinstance(num_bns, bool) or not isinstance(num_bns, int) or num_bns < 1:
            raise errors.FastslimValueError(f"num_bns must be a positive whole number, got {num_bns!r}")
        for _ in range(num_bns - 1 - len(self.further_bns)):
            bn = SlimBatchNorm2d(self.num_features, self.eps, self.momentum, self.affine, self.track_running_stats)
            with torch.no_grad():
                for name, full in (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)):
                    bn = bn.to(full.device, full.dtype) if full.is_floating_point() else bn
                    getattr(bn, name).copy_(full)
            self.further_bns.append(bn.train(self.training))

    def select(self, index: int) -> None:
        """Uses this set from now on.

        Raises:
            FastslimValueError: there is none of this number.
        """
        if not isinstance(index, int) or not 0 <= index <= len(self.further_bns):
            raise errors.FastslimValueError(f"subnet {index!r} has no set; choose 0 to {len(self.further_bns)}")
        self.index = index

    def _chosen(self) -> SlimBatchNorm2d | None:
        """The chosen set at the present width; None when it is the layer's own."""
        if not self.index:
            return None
        bn = self.further_bns[self.index - 1]
        assert isinstance(bn, SlimBatchNorm2d)
        bn.segments, bn.active_out, bn.calibrated = self.segments, self.active_out, self.calibrated
        return bn

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str = "none") -> Tensor:
        """``activation(chosen_bn(x) + residual)`` for ``(N, c, H, W)``."""
        bn = self._chosen()
        return super().forward(x, residual, activation) if bn is None else bn.forward(x, residual, activation)

    def _forward_following(self, x: Tensor, residual: Tensor | None = None, activation: str = "none") -> Tensor:
        bn = self._chosen()
        following = super()._forward_following if bn is None else bn._forward_following
        return following(x, residual, activation)

    def to_torch(self, in_channels: int | None = None) -> nn.Module:
        """A plain :class:`torch.nn.BatchNorm2d` with the chosen set, see :class:`SlimLayer`."""
        bn = self._chosen()
        return super().to_torch(in_channels) if bn is None else bn.to_torch(in_channels)
