"""The ops batch_norm_act and batch_norm_act_backward, computed by the CUDA kernels run on the CPU."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]  # as ElementType counts them
MAX_SEGMENTS = 64
_LONG, _POINTER, _REAL = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double


class Call(ctypes.Structure):
    """As in batch_norm_act.cpp."""

    _fields_ = [
        *((name, _LONG) for name in "dtype outer inner channels multiple activation training sums segments".split()),
        ("momentum", _REAL),
        ("eps", _REAL),
        ("width", _POINTER),
        ("vectors", _POINTER * 4),
        ("strides", _LONG * 4),
        ("types", _LONG * 4),
        ("start", ctypes.c_int32 * MAX_SEGMENTS),
        ("count", ctypes.c_int32 * MAX_SEGMENTS),
        *((name, _POINTER) for name in "first second third out out_residual dweight dbias stats workspace".split()),
    ]

    def point(self, **tensors: Tensor | None) -> None:
        """Sets pointers to tensors."""
        for name, tensor in tensors.items():
            setattr(self, name, None if tensor is None else tensor.data_ptr())


class Emulated:
    """The ops on CPU tensors.

    Args:
        library: tests/cuda_emulation/batch_norm_act.cpp, compiled.
        beyond: with it the channels come from device memory, where the host expects so many more.
    """

    def __init__(self, library: ctypes.CDLL, beyond: int = 0) -> None:
        self.library, self.beyond = library, beyond
        library.workspace_bytes.restype = _LONG

    def _call(self, x: Tensor, vectors: tuple[Tensor | None, ...], segments: list[int], activation: int) -> Call:
        n, channels = x.shape[:2]
        pixels = x[0, 0].numel() if x.numel() else 1
        rows = pixels == 1 or not x.is_contiguous()
        self.active = torch.tensor(channels, dtype=torch.int32)
        call = Call(
            dtype=DTYPES.index(x.dtype),
            outer=(n * pixels if rows else n) if x.numel() else 0,
            inner=1 if rows else pixels,
            channels=channels + self.beyond,
            multiple=8 if self.beyond else channels,
            activation=activation,
            segments=len(segments) // 2,
        )
        if self.beyond:
            call.point(width=self.active)
        for i, vector in enumerate(vectors):
            if vector is not None:
                call.vectors[i], call.strides[i] = vector.data_ptr(), vector.stride(0)
                call.types[i] = DTYPES.index(vector.dtype)
        call.start[: call.segments], call.count[: call.segments] = segments[::2], segments[1::2]
        return call

    def _workspace(self, call: Call) -> Tensor:
        """Poisoned; with a mark behind it that must stay."""
        self.workspace = torch.full((self.library.workspace_bytes(ctypes.byref(call)) + 64,), 255, dtype=torch.uint8)
        self.workspace[-64:] = 7
        return self.workspace

    def _run(self, function: str, call: Call) -> None:
        getattr(self.library, function)(ctypes.byref(call))
        assert self.workspace[-64:].eq(7).all()

    def batch_norm_act(
        self, x, weight, bias, running_mean, running_var, residual, training, momentum, eps, activation, segments
    ) -> tuple[Tensor, Tensor]:
        """As the op."""
        call = self._call(x, (weight, bias, running_mean, running_var), segments, activation)
        call.training, call.momentum, call.eps = training, momentum, eps
        y, stats = torch.full_like(x, torch.nan), torch.full((2, x.shape[1]), torch.nan, dtype=torch.float64)
        call.point(first=x, second=residual, out=y, stats=stats, workspace=self._workspace(call))
        self._run("forward", call)
        return y, stats

    def batch_norm_act_backward(
        self, dy, x, extra, stats, weight, bias, training, activation, want_residual, want_parameters, segments
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As the op."""
        call = self._call(x, (weight, bias, None, None), segments, activation)
        call.training, call.sums = training, training or want_parameters
        dx = torch.full_like(x, torch.nan)
        dresidual = torch.full_like(x if want_residual else x.new_empty(0), torch.nan)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        dweight, dbias = torch.full((2, x.shape[1]), torch.nan, dtype=wide)
        call.point(first=dy, second=x, third=extra, out=dx, out_residual=dresidual if want_residual else None)
        call.point(dweight=dweight, dbias=dbias, stats=stats, workspace=self._workspace(call))
        self._run("backward", call)
        return dx, dresidual, dweight, dbias

    def finalize(self, partials, rows, rows_per_chunk, weight, bias, mean, var, momentum, eps, segments):
        """As the op batch_norm_finalize."""
        rows_of_channels = partials.new_empty(rows, partials.shape[2])
        call = self._call(rows_of_channels, (weight, bias, mean, var), segments, 0)
        call.training, call.momentum, call.eps = True, momentum, eps
        stats = torch.full((2, partials.shape[2]), torch.nan, dtype=torch.float64)
        coefficients = torch.full((3, partials.shape[2]), torch.nan)
        call.point(first=partials, out=coefficients, stats=stats)
        self.library.finalize(ctypes.byref(call), _LONG(rows_per_chunk))
        return stats, coefficients
