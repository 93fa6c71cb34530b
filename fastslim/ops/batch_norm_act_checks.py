"""What batch_norm_act refuses, and what it says then."""

from __future__ import annotations

import torch
from torch import Tensor

from fastslim import errors


def check_arguments(x: Tensor, vectors: tuple[Tensor | None, ...], residual: Tensor | None) -> None:
    """Refuses tensors that do not belong together.

    Args:
        x: input ``(N, C, ...)``.
        vectors: weight, bias, running mean and running variance of the full layer.
        residual: what is added, or None.

    Raises:
        FastslimValueError: shapes or devices that do not fit.
        FastslimTypeError: an integer input, or vectors whose data type does not go with x's.
    """
    if x.dim() < 2:
        raise errors.FastslimValueError(f"batch_norm_act: x must be (N, C, ...), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise errors.FastslimTypeError(f"batch_norm_act: x is {x.dtype}; convert it first: x.float()")
    if (vectors[2] is None) != (vectors[3] is None):
        raise errors.FastslimValueError("batch_norm_act: give both running_mean and running_var, or neither")
    size = None
    for name, vector in zip(("weight", "bias", "running_mean", "running_var"), vectors, strict=True):
        if vector is None:
            continue
        if vector.dim() != 1 or (size is not None and vector.shape[0] != size):
            raise errors.FastslimValueError(
                f"batch_norm_act: {name} is {tuple(vector.shape)}; weight, bias and running statistics are vectors "
                "of one length, the layer's channels"
            )
        size = vector.shape[0]
        if vector.dtype != x.dtype and (vector.dtype != torch.float32 or x.dtype == torch.float64):
            raise errors.FastslimTypeError(
                f"batch_norm_act: {name} is {vector.dtype} but x is {x.dtype}; keep the layer in float32 or in "
                "x's data type"
            )
        if vector.device != x.device:
            raise errors.FastslimValueError(
                f"batch_norm_act: {name} is on {vector.device} but x on {x.device}; move the layer there"
            )
    if residual is not None and residual.shape != x.shape:
        raise errors.FastslimValueError(
            f"batch_norm_act: the residual is {tuple(residual.shape)} but x is {tuple(x.shape)}; they must be equal: "
            "both come from layers of one channel unit"
        )
