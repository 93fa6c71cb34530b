"""The masks of multi-head attention, as one tensor that is added to the scores."""

from __future__ import annotations

import torch
from torch import Tensor

from fastslim import errors


def added_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor, full_heads: int
) -> Tensor | None:
    """Both masks together, of a shape that broadcasts to ``(N, heads, L, S)``.

    Args:
        attn_mask: ``(L, S)``, or ``(N * heads, L, S)`` for all heads of the layer or for the active
            ones; True hides a position, numbers are added.
        key_padding_mask: ``(N, S)``, likewise.
        q: ``(N, heads, L, head_dim)``.
        k: ``(N, heads, S, head_dim)``.
        full_heads: heads of the full layer.

    Raises:
        FastslimValueError: a mask of another shape.
        FastslimTypeError: a mask that is neither boolean nor floating point.
    """
    (batch, heads, length, _), source = q.shape, k.shape[2]
    result = None
    if attn_mask is not None:
        shapes = {(length, source), *((batch * n, length, source) for n in (heads, full_heads))}
        if tuple(attn_mask.shape) not in shapes:
            raise errors.FastslimValueError(
                f"attn_mask has shape {tuple(attn_mask.shape)}; it must be ({length}, {source}) or "
                f"({batch * full_heads}, {length}, {source})"
            )
        result = _numbers("attn_mask", attn_mask, q.dtype)
        if attn_mask.dim() == 3:
            result = result.view(batch, -1, length, source)[:, :heads]
    if key_padding_mask is None:
        return result
    if key_padding_mask.shape != (batch, source):
        raise errors.FastslimValueError(
            f"key_padding_mask has shape {tuple(key_padding_mask.shape)}; it must be ({batch}, {source})"
        )
    padding = _numbers("key_padding_mask", key_padding_mask, q.dtype).view(batch, 1, 1, source)
    return padding if result is None else result + padding


def _numbers(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    if not mask.is_floating_point():
        raise errors.FastslimTypeError(f"{name} is {mask.dtype}; make it boolean or floating point")
    return mask
