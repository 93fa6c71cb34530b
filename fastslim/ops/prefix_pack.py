"""Moves many blocks of memory at once: weights into packed low-precision prefixes, gradients back into theirs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastslim import errors
from fastslim.ops import backend

_LIB = torch.library.Library("fastslim", "FRAGMENT")
for _suffix in ("", "_triton"):
    _LIB.define(f"prefix_pack{_suffix}(Tensor[] sources, Tensor(a!)[] targets, bool[] add) -> ()")
# A table holds addresses, so what is written through it is not in the schema: only TransferTable uses these.
_LIB.define("prefix_pack_table(Tensor[] sources, Tensor[] targets, bool[] add, bool widths, int dense) -> Tensor")
_LIB.define("prefix_pack_run(Tensor table, Tensor? widths, int tiles) -> ()")
_OPS = torch.ops.fastslim
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DENSE = {None: 0, "source": 1, "target": 2}


class Transfer(NamedTuple):
    """One block of memory to move.

    Attributes:
        source: float32, bfloat16, float16 or float64, any strides, at most 4 dimensions (more where they
            lie behind one another), fewer than 2^31 elements apart.
        target: the same shape, any strides and one of these dtypes: a prefix of a weight or gradient, a
            packed buffer. It must not overlap itself, nor anything another transfer of the call touches.
        add: ``target += source``, summed in float32 (float64 if either is) and rounded once, instead of
            ``target = source``.
    """

    source: Tensor
    target: Tensor
    add: bool = False


def _rule(target: str, dtype: torch.dtype) -> backend.Choice:
    if not backend.is_gpu(target):
        return backend.Choice("reference", "one copy or add a block; only a GPU gains from a single launch")
    reason = "one launch a block: no kernel can run"
    return backend.gpu_choice("prefix_pack", target, dtype, ("cuda", "triton"), backend.Choice("reference", reason))


def _refuses(kernel: str, target: str, dtype: torch.dtype) -> str | None:
    if kernel == "triton" and target == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter is wrong in bfloat16"
    return None


backend.register("prefix_pack", ("reference", "cuda", "triton"), _rule, _refuses)


def prefix_pack(transfers: Sequence[Transfer]) -> None:
    """Casts, copies or adds all transfers; on a GPU in one launch.

    The CUDA kernel takes addresses and shapes as its arguments (340 transfers a launch), so a captured
    graph holds them. Triton's reads them from a table that is uploaded from pinned memory; while a stream
    is captured, when that memory would have to stay as it is for ever, every block is a launch of its own.

    Args:
        transfers: on one device; may be empty, as may each of them.

    Raises:
        FastslimValueError: tensors on several devices, shapes that differ, or too many dimensions.
        FastslimTypeError: a dtype that is no float.
    """
    if transfers:
        sources, targets, add = map(list, zip(*transfers, strict=True))
        _move(sources, targets, add)


def prefix_unpack_add(sources: Sequence[Tensor], targets: Sequence[Tensor], add: Sequence[bool] | None = None) -> None:
    """Adds dense gradients to their regions of the gradient buffer: :func:`prefix_pack` the other way.

    Args:
        sources: such as a library's weight gradients, dense and in low precision.
        targets: the region of each, such as ``slot.view[:c_out, :c_in]``.
        add: False where the region is overwritten; None adds all.

    Raises:
        FastslimValueError: see :func:`prefix_pack`; or lists of different lengths.
        FastslimTypeError: see :func:`prefix_pack`.
    """
    add = [True] * len(targets) if add is None else list(add)
    if not len(sources) == len(targets) == len(add):
        raise errors.FastslimValueError(f"{len(sources)} sources, {len(targets)} targets and {len(add)} add differ")
    if targets:
        _move(list(sources), list(targets), add)


def _move(sources: list[Tensor], targets: list[Tensor], add: list[bool]) -> None:
    kernel = _chosen(targets)
    if kernel == "reference":
        _check(sources, targets)
        _reference(sources, targets, add)
        return
    with torch.no_grad(), _errors_named(sources, targets):
        (_OPS.prefix_pack if kernel == "cuda" else _OPS.prefix_pack_triton)(sources, targets, add)


def _chosen(targets: Sequence[Tensor]) -> str:
    return backend.choose("prefix_pack", backend.target_of(targets[0]), targets[0].dtype).backend


@contextlib.contextmanager
def _errors_named(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Iterator[None]:
    """Says what a kernel's binding refused, in a loop over all tensors that costs nothing while all is well."""
    try:
        yield
    except RuntimeError as error:
        _check(sources, targets)
        if refused := re.search(r"prefix_pack: (transfer \d+ .*)", str(error)):
            raise errors.FastslimValueError(refused[1]) from None
        raise


def _check(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    device = targets[0].device
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if source.device != device or target.device != device:
            raise errors.FastslimValueError(
                f"transfer {i} goes from {source.device} to {target.device}, the first to {device}; "
                "make one call for each device"
            )
        if source.shape != target.shape:
            raise errors.FastslimValueError(
                f"transfer {i}: source {tuple(source.shape)} and target {tuple(target.shape)} differ in shape"
            )
        if source.dtype not in _DTYPES or target.dtype not in _DTYPES:
            raise errors.FastslimTypeError(
                f"transfer {i} goes from {source.dtype} to {target.dtype}; float32, bfloat16, float16 and float64 work"
            )


def _reference(sources: Sequence[Tensor], targets: Sequence[Tensor], add: Sequence[bool]) -> None:
    with torch.no_grad():
        for source, target, adds in zip(sources, targets, add, strict=True):
            target.add_(source) if adds else target.copy_(source)


_LIB.impl("prefix_pack", _reference, "CompositeExplicitAutograd")  # _C_cuda's kernel takes precedence on a GPU


def _triton(sources: list[Tensor], targets: list[Tensor], add: list[bool]) -> None:
    from fastslim.kernels import prefix_pack as kernels

    if targets and targets[0].is_cuda and torch.cuda.is_current_stream_capturing():
        _reference(sources, targets, add)
    elif targets:
        table = _OPS.prefix_pack_table(sources, targets, add, False, 0)
        kernels.launch_prefix_pack(_uploaded(table, targets[0].device), _tiles(table))


_LIB.impl("prefix_pack_triton", _triton, "CUDA")
if backend.interpreting():
    _LIB.impl("prefix_pack_triton", _triton, "CPU")


@torch.library.register_fake("fastslim::prefix_pack", lib=_LIB)
def _fake(sources, targets, add):
    return None


torch.library.register_fake("fastslim::prefix_pack_triton", _fake, lib=_LIB)


def _tiles(table: Tensor) -> int:
    """How many tiles all transfers of a table in CPU memory have; its last row holds their number."""
    return int(table[-1, -1]) >> 32


def _uploaded(table: Tensor, device: torch.device) -> Tensor:
    """The table on the device, ready for the current stream."""
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


class TransferTable:
    """Transfers whose memory stays where it is from step to step, described once in device memory.

    :meth:`run` is one launch and no copy to the device, so it may be captured; the table itself must be
    made before, on the stream that will run it or one that this stream has waited for.

    Args:
        transfers: as :func:`prefix_pack` takes them, at full size. Their tensors are kept alive.
        dense: the side, ``"source"`` or ``"target"``, that holds the active channels only, packed one
            behind the other in the order of its full-size strides; None if neither does.

    Raises:
        FastslimValueError: see :func:`prefix_pack`; or the dense side has gaps.
        FastslimTypeError: see :func:`prefix_pack`.
        FastslimRuntimeError: a stream is being captured.
    """

    def __init__(self, transfers: Sequence[Transfer], *, dense: Literal["source", "target"] | None = None) -> None:
        if dense not in _DENSE:
            raise errors.FastslimValueError(f'dense={dense!r}: choose "source", "target" or None')
        self.transfers = tuple(transfers)
        self.dense = dense
        if not self.transfers:
            return
        sources, targets, add = map(list, zip(*self.transfers, strict=True))
        _check(sources, targets)
        for i, transfer in enumerate(self.transfers):
            full = {"source": transfer.source, "target": transfer.target}.get(dense)
            if full is not None and full.numel() and full.stride() != _packed_stride(full, full.shape):
                raise errors.FastslimValueError(
                    f"transfer {i}: dense={dense!r}, but the {dense}'s strides {full.stride()} leave gaps"
                )
        self._device = targets[0].device
        self._backend = _chosen(targets)
        if self._backend == "reference":
            return
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise errors.FastslimRuntimeError("a table is made before the capture that runs it, not inside")
        # Dimensions that follow a width are not merged with others: slower, so not for calls without widths.
        self._tables = {}
        for widths in (False, True):
            with _errors_named(sources, targets):
                table = _OPS.prefix_pack_table(sources, targets, add, widths, _DENSE[dense] if widths else 0)
            self._tables[widths] = _uploaded(table, self._device), _tiles(table)

    def run(self, widths: Tensor | None = None) -> None:
        """Moves everything again.

        Args:
            widths: ``(len(transfers), 2)`` int32 on the transfers' device: how many leading entries of
                dimension 0 (c_out) and 1 (c_in) of each transfer are moved, at most all. The kernels
                read them when they run, so one captured graph serves every width. None: everything.

        Raises:
            FastslimValueError: widths of another shape, dtype or device.
        """
        if not self.transfers:
            return
        if widths is not None:
            self._check_widths(widths)
        if self._backend == "reference":
            self._run_reference(widths)
            return
        table, tiles = self._tables[widths is not None]
        if self._backend == "cuda":
            _OPS.prefix_pack_run(table, widths, tiles)
        else:
            from fastslim.kernels import prefix_pack as kernels

            kernels.launch_prefix_pack(table, tiles, widths)

    def _check_widths(self, widths: Tensor) -> None:
        shape = (len(self.transfers), 2)
        if widths.shape != shape or widths.dtype != torch.int32 or widths.device != self._device:
            raise errors.FastslimValueError(
                f"widths must be int32 {shape} on {self._device}, "
                f"not {widths.dtype} {tuple(widths.shape)} on {widths.device}"
            )
        if not widths.is_contiguous():
            raise errors.FastslimValueError("widths must be contiguous")

    def _run_reference(self, widths: Tensor | None) -> None:
        active = [None] * len(self.transfers) if widths is None else widths.tolist()
        sides = [self._active(transfer, width) for transfer, width in zip(self.transfers, active, strict=True)]
        sources, targets = zip(*sides, strict=True)
        _reference(sources, targets, [transfer.add for transfer in self.transfers])

    def _active(self, transfer: Transfer, width: list[int] | None) -> tuple[Tensor, Tensor]:
        source, target = transfer.source, transfer.target
        if width is None:
            return source, target
        region = tuple(slice(0, max(count, 0)) for count in width[: source.dim()])
        shape = source[region].shape
        source = _packed(source, shape) if self.dense == "source" else source[region]
        target = _packed(target, shape) if self.dense == "target" else target[region]
        return source, target


def _packed_stride(full: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor of `shape` in the order of the full one's; where that is 1 deep, its own."""
    stride, elements = [0] * full.dim(), 1
    for d in sorted(range(full.dim()), key=full.stride):
        if full.shape[d] == 1:
            stride[d] = full.stride(d)
        else:
            stride[d], elements = elements, elements * shape[d]
    return tuple(stride)


def _packed(full: Tensor, shape: torch.Size) -> Tensor:
    return full.as_strided(shape, _packed_stride(full, shape), full.storage_offset())
