"""Weights as a step computes with them: cast once a step, their active parts packed once a pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastslim.ops.prefix_pack import Transfer, prefix_pack
from fastslim.ops.segments import Segments, pieces


class Prefix(NamedTuple):
    """The active part of a weight ``(C_out, C_in, ...)``: the first `c_out` rows, and input channels."""

    c_out: int
    c_in: int
    segments: Segments | None


class _Cast:
    """A parameter's low-precision copy."""

    __slots__ = ("parameter", "tensor", "valid")

    def __init__(self, parameter: Tensor, tensor: Tensor) -> None:
        self.parameter, self.tensor, self.valid = parameter, tensor, False


class WeightCache:
    """Low-precision copies of weights and dense copies of their active parts, in memory that lives on.

    Args:
        together: cast all weights at the start of a step, in one launch, as far as they are known
            from the step before; else each when it is needed.
    """

    def __init__(self, together: bool) -> None:
        self._together = together
        self._casts: dict[tuple[int, torch.dtype], _Cast] = {}
        self._memory: dict[tuple[int, torch.dtype, int], Tensor] = {}
        self._packed: dict[tuple[int, torch.dtype], tuple[Prefix, Tensor]] = {}

    def begin(self) -> None:
        """Starts a step: the weights have changed."""
        self._packed.clear()
        if self._together:
            pack_each([Transfer(cast.parameter.detach(), cast.tensor) for cast in self._casts.values()])
        for cast in self._casts.values():
            cast.valid = self._together

    def forget(self) -> None:
        """Makes what is asked for next anew: it was to be computed by launches that never run."""
        self._packed.clear()
        for cast in self._casts.values():
            cast.valid = False

    def cast(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """The parameter, detached, in `dtype`."""
        if parameter.dtype == dtype:
            return parameter.detach()
        cast = self._casts.get((id(parameter), dtype))
        if cast is None:
            tensor = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
            cast = self._casts[id(parameter), dtype] = _Cast(parameter, tensor)
        if not cast.valid:
            cast.tensor.copy_(parameter.detach())
            cast.valid = True
        return cast.tensor

    def pack(self, wanted: Iterable[tuple[Tensor, torch.dtype, Prefix]], lane: int = 0) -> None:
        """Starts a pass: packs parts of weights into dense channels_last memory, in one launch on a GPU.

        Args:
            wanted: a weight ``(C_out, C_in, kh, kw)``, the data type of the computation, and the part.
            lane: passes that run at the same time must not share memory.
        """
        self._packed.clear()
        transfers = []
        for weight, dtype, prefix in wanted:
            if (id(weight), dtype) in self._packed:  # layers that share a weight: the first one has the memory
                continue
            memory = self._memory.get((id(weight), dtype, lane))
            if memory is None:
                memory = torch.empty(weight.numel(), dtype=dtype, device=weight.device)
                self._memory[id(weight), dtype, lane] = memory
            kh, kw = weight.shape[2:]
            packed = memory[: prefix.c_out * kh * kw * prefix.c_in].view(prefix.c_out, kh, kw, prefix.c_in)
            packed = packed.permute(0, 3, 1, 2)
            source = self.cast(weight, dtype)[: prefix.c_out]
            for start, offset, count in pieces(prefix.segments, prefix.c_in):
                transfers.append(Transfer(source.narrow(1, start, count), packed.narrow(1, offset, count)))
            self._packed[id(weight), dtype] = prefix, packed
        pack_each(transfers)

    def packed(self, weight: Tensor, dtype: torch.dtype, prefix: Prefix) -> Tensor | None:
        """The part of a weight that this pass has packed, ``(c_out, c_in, kh, kw)`` in channels_last, if any."""
        made_for, tensor = self._packed.get((id(weight), dtype), (None, None))
        return tensor if made_for == prefix else None


def pack_each(transfers: list[Transfer]) -> None:
    """Moves everything, in one launch a device."""
    by_device: dict[torch.device, list[Transfer]] = {}
    for transfer in transfers:
        by_device.setdefault(transfer.target.device, []).append(transfer)
    for together in by_device.values():
        prefix_pack(together)
