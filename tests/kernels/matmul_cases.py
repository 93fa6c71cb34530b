"""What tests of the matrix kernels share: full weights with NaN outside the prefix, definitions of fused parts."""

from __future__ import annotations

import torch
from torch import Tensor

from fastslim.kernels.matmul_tiles import Tile

TINY = Tile(16, 16, 16, 4, 2, group=2)  # several blocks in every direction at sizes the interpreter can do
DTYPES = [torch.float32, torch.float16]  # the interpreter computes bfloat16 wrongly


def full_weight(c_out: int, c_in: int, kernel: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """`(c_out + 5, c_in + 9, *kernel)`, NaN outside the prefix."""
    weight = torch.full((c_out + 5, c_in + 9, *kernel), float("nan"), dtype=dtype)
    weight[:c_out, :c_in] = torch.randn(c_out, c_in, *kernel).to(dtype)
    return weight


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def activate(value: Tensor, activation: int) -> Tensor:
    """The activation with this code."""
    names = ("none", "relu", "relu6", "silu", "hardswish")
    return value if activation == 0 else getattr(torch.nn.functional, names[activation])(value)


def prologue_of(x: Tensor, prologue: Tensor, activation: int) -> Tensor:
    """The prologue of rows of channels, rounded to the dtype of x."""
    center, scale, shift = prologue
    return activate((x.float() - center) * scale + shift, activation).to(x.dtype)


def statistics(rows: Tensor, chunk: int) -> Tensor:
    """Per chunk of rows: its first row, and sums of differences from it and of their squares, in float64."""
    parts = []
    for part in rows.double().split(chunk):
        difference = part - part[0]
        parts.append(torch.stack([part[0], difference.sum(0), difference.square().sum(0)]))
    return torch.stack(parts)


def assert_close(mine: Tensor, true: Tensor, depth: int) -> None:
    """Error of a sum of `depth` rounded products with fp32 accumulation, rounded to the dtype of `mine`."""
    assert mine.shape == true.shape
    assert torch.isfinite(mine).all()
    eps = torch.finfo(mine.dtype).eps
    allowed = true.abs() * eps + true.abs().max() * (eps + depth**0.5 * torch.finfo(torch.float32).eps)
    assert ((mine.double() - true).abs() <= allowed).all(), float((mine.double() - true).abs().max())
