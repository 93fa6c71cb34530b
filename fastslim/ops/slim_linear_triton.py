"""`slim_linear` by the Triton kernels as opaque ops, and fused with the batch norms around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastslim.ops import backend, measured
from fastslim.ops.batch_norm_act import ACTIVATIONS
from fastslim.ops.segments import Segments, cut, pieces, unflatten

_LIB = torch.library.Library("fastslim", "FRAGMENT")
_LIB.define("slim_linear_triton(Tensor x, Tensor weight, Tensor? bias, int c_out, int[] segments) -> Tensor")
_LIB.define(
    "slim_linear_backward_input_triton("
    "Tensor grad, Tensor weight, int c_in, int[] segments, Tensor? saved, int activation) -> Tensor"
)
_LIB.define(
    "slim_linear_backward_weight_triton(Tensor grad, Tensor x, Tensor(a!) grad_weight, int[] segments, bool add, "
    "Tensor? prologue, int activation) -> ()"
)
_LIB.define(
    "slim_linear_bn_triton(Tensor x, Tensor weight, Tensor? bias, int c_out, int[] segments, Tensor? prologue, "
    "int activation) -> (Tensor, Tensor)"
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CHUNK = 128  # rows of a chunk of partial statistics, as of every tile


def refusal(target: str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot compute this data type, or None."""
    if dtype not in DTYPES:
        return f"the Triton kernel computes float32, bfloat16 and float16, not {dtype}"
    if target == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter is wrong in bfloat16"
    return None


def recorded_tile(op: str, x: Tensor, direction: str, sizes: tuple[int, int, int]) -> str | None:
    """Name of the tile that a benchmark recorded as fastest for rows, c_in and c_out, or None."""
    record = measured.best(backend.target_of(x), measured.key(f"{op}.tile", x.dtype, direction), sizes)
    return None if record is None else record.backend


def with_prologue(x: Tensor, prologue: Tensor | None, activation: int) -> Tensor:
    """act((x - center) * scale + shift) of rows of channels, rounded to the dtype of x; prologue (3, C)."""
    if prologue is None:
        return x
    center, scale, shift = prologue
    value, name = (x.float() - center) * scale + shift, ACTIVATIONS[activation]
    return (value if name == "none" else getattr(F, name)(value)).to(x.dtype)


def partial_statistics(rows: Tensor) -> Tensor:
    """For every :data:`CHUNK` of rows (R, C): first row, sums of differences from it, and of their squares."""
    parts = []
    for chunk in rows.float().split(CHUNK) if len(rows) else ():
        difference = chunk - chunk[:1]
        parts.append(torch.stack([chunk[0], difference.sum(0), difference.square().sum(0)]))
    return torch.stack(parts)


def slim_linear_bn_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    c_out: int,
    segments: Segments | None,
    prologue: Tensor | None,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """The definition of `slim_linear_bn_triton`: the output, and partial statistics for `batch_norm_finalize`."""
    w = cut(cut(weight, 0, None, c_out), 1, segments, x.shape[-1])
    y = F.linear(with_prologue(x, prologue, activation), w, None if bias is None else bias[:c_out])
    return y, partial_statistics(y.reshape(-1, c_out))


def multiply(
    rows: Tensor,
    matrix: Tensor,
    y: Tensor,
    segments: Segments | None,
    *,
    bias: Tensor | None = None,
    prologue: Tensor | None = None,
    activation: int = 0,
    stats: Tensor | None = None,
) -> None:
    """Writes ``y (R, c_out) = p(rows (R, c_in)) @ matrix (c_out, C_in)[:, segments]^T + bias``; pieces add in fp32."""
    from fastslim.kernels.slim_linear import launch_slim_linear_fwd

    parts = [part for part in pieces(segments, rows.shape[1]) if part[2]]
    tile = recorded_tile("slim_linear", rows, "forward", (*rows.shape, y.shape[1]))
    sums = y.new_empty(y.shape, dtype=torch.float32) if len(parts) > 1 else None
    for index, (start, offset, count) in enumerate(parts):
        last = index == len(parts) - 1
        launch_slim_linear_fwd(
            rows.narrow(1, offset, count),
            matrix.narrow(1, start, count).t(),
            y if last else sums,
            bias=bias if last else None,
            prologue=None if prologue is None else prologue[:, offset : offset + count].contiguous(),
            activation=activation,
            addend=sums if index else None,
            stats=stats if last else None,
            recorded=tile,
        )


def multiply_backward_input(
    grads: Tensor, matrix: Tensor, dx: Tensor, segments: Segments | None, saved: Tensor | None, activation: int
) -> None:
    """Writes ``dx (R, c_in) = grads (R, c_out) @ matrix (c_out, C_in)[:, segments]``, masked by `saved (R, c_in)`."""
    from fastslim.kernels.slim_linear import launch_slim_linear_fwd

    tile = recorded_tile("slim_linear", grads, "backward_input", (*dx.shape, grads.shape[1]))
    for start, offset, count in pieces(segments, dx.shape[1]):
        launch_slim_linear_fwd(
            grads,
            matrix.narrow(1, start, count),
            dx.narrow(1, offset, count),
            saved=None if saved is None else saved.narrow(1, offset, count),
            saved_activation=activation,
            transposed=True,
            recorded=tile,
        )


def multiply_backward_weight(
    grads: Tensor,
    rows: Tensor,
    gradient: Tensor,
    segments: Segments | None,
    add: bool,
    prologue: Tensor | None,
    activation: int,
) -> None:
    """Adds or writes ``grads (R, c_out)^T @ p(rows (R, c_in))`` to ``gradient (c_out, C_in)[:, segments]``."""
    from fastslim.kernels.slim_linear import launch_slim_linear_bwd_weight

    tile = recorded_tile("slim_linear", grads, "backward_weight", (*rows.shape, grads.shape[1]))
    for start, offset, count in pieces(segments, rows.shape[1]):
        launch_slim_linear_bwd_weight(
            grads,
            rows.narrow(1, offset, count),
            gradient.narrow(1, start, count),
            add=add,
            prologue=None if prologue is None else prologue[:, offset : offset + count].contiguous(),
            activation=activation,
            recorded=tile,
        )


def _matrix(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _forward(x, weight, bias, c_out, segments):
    y = x.new_empty(*x.shape[:-1], c_out)
    b = None if bias is None else bias[:c_out]
    multiply(_matrix(x), weight[:c_out], y.view(-1, c_out), unflatten(segments), bias=b)
    return y


def _forward_bn(x, weight, bias, c_out, segments, prologue, activation):
    y, rows = x.new_empty(*x.shape[:-1], c_out), _matrix(x)
    stats = x.new_empty(-(-len(rows) // CHUNK), 3, c_out, dtype=torch.float32)
    fused = dict(prologue=prologue, activation=activation, stats=stats)
    b = None if bias is None else bias[:c_out]
    multiply(rows, weight[:c_out], y.view(-1, c_out), unflatten(segments), bias=b, **fused)
    return y, stats


def _backward_input(grad, weight, c_in, segments, saved, activation):
    dx, grads = grad.new_empty(*grad.shape[:-1], c_in), _matrix(grad)
    kept = None if saved is None else _matrix(saved)
    multiply_backward_input(grads, weight[: grads.shape[1]], dx.view(-1, c_in), unflatten(segments), kept, activation)
    return dx


def _backward_weight(grad, x, grad_weight, segments, add, prologue, activation):
    grads = _matrix(grad)
    region = grad_weight[: grads.shape[1]]
    multiply_backward_weight(grads, _matrix(x), region, unflatten(segments), add, prologue, activation)


def register_kernels(lib: torch.library.Library, **ops) -> None:
    """Implements opaque ops for CUDA, and for the CPU where Triton's interpreter computes them."""
    for name, function in ops.items():
        for key in ("CUDA", "CPU") if backend.interpreting() else ("CUDA",):
            lib.impl(name, function, key)


register_kernels(
    _LIB,
    slim_linear_triton=_forward,
    slim_linear_backward_input_triton=_backward_input,
    slim_linear_backward_weight_triton=_backward_weight,
    slim_linear_bn_triton=_forward_bn,
)


@torch.library.register_fake("fastslim::slim_linear_triton", lib=_LIB)
def _fake(x, weight, bias, c_out, segments):
    return x.new_empty(*x.shape[:-1], c_out)


@torch.library.register_fake("fastslim::slim_linear_bn_triton", lib=_LIB)
def _fake_bn(x, weight, bias, c_out, segments, prologue, activation):
    chunks = (x.numel() // x.shape[-1] + CHUNK - 1) // CHUNK
    return x.new_empty(*x.shape[:-1], c_out), x.new_empty(chunks, 3, c_out, dtype=torch.float32)


@torch.library.register_fake("fastslim::slim_linear_backward_input_triton", lib=_LIB)
def _fake_backward_input(grad, weight, c_in, segments, saved, activation):
    return grad.new_empty(*grad.shape[:-1], c_in)


@torch.library.register_fake("fastslim::slim_linear_backward_weight_triton", lib=_LIB)
def _fake_backward_weight(*arguments):
    return None
