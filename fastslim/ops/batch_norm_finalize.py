"""Statistics of a batch out of partial sums that another kernel's epilogue made.

`fastslim::batch_norm_finalize` is the second stage of batch_norm_act alone: a convolution that sums
up its output chunk by chunk spares batch_norm_act one read of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastslim.ops.segments import cut_optional, pieces, unflatten

_LIBRARY = torch.library.Library("fastslim", "FRAGMENT")
_LIBRARY.define(
    "batch_norm_finalize(Tensor partials, int rows, int rows_per_chunk, Tensor? weight, Tensor? bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps, int[] segments) "
    "-> (Tensor stats, Tensor coefficients)"
)


def batch_norm_finalize_reference(
    partials: Tensor,
    rows: int,
    rows_per_chunk: int,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    segments: list[int],
) -> tuple[Tensor, Tensor]:
    """Merges partial sums, updates the running statistics, makes the coefficients of the normalisation.

    Args:
        partials: float32 ``(chunks, 3, C)``: of each chunk of rows a shift near its values (such as
            its first row), the sum of ``x - shift`` and the sum of ``(x - shift) ** 2``.
        rows: how many values each channel has.
        rows_per_chunk: rows of every chunk; the last one has what is left.
        weight: the full layer's scale, or None for 1.
        bias: the full layer's shift, or None for 0.
        running_mean: the full layer's, updated in place; or None.
        running_var: as `running_mean`.
        momentum: share of the batch in the running statistics.
        eps: added to the variance.
        segments: active channels, flat pairs of start and count; empty for the first `C`.

    Returns:
        ``(2, C)`` float64 mean and ``1 / sqrt(variance + eps)``, as batch_norm_act's backward takes
        them; ``(3, C)`` float32 center, scale and shift: ``bn(x) = (x - center) * scale + shift``.
    """
    chunks, _, channels = partials.shape
    of_channels = unflatten(segments)
    counts = torch.full((chunks, 1), rows_per_chunk, dtype=torch.float64, device=partials.device)
    counts[-1] = rows - (chunks - 1) * rows_per_chunk
    shift, total, square = partials.double().unbind(1)
    d = shift - shift[0]  # all chunks about one shift (Chan et al. 1983)
    about = (total + counts * d).sum(0) / rows
    variance = ((square + d * (2 * total + counts * d)).sum(0) / rows - about * about).clamp_min(0)
    mean, invstd = shift[0] + about, (variance + eps).rsqrt()
    for running, batch in ((running_mean, mean), (running_var, variance * rows / (rows - 1))):
        if running is not None:
            for start, offset, count in pieces(of_channels, channels):
                active = running[start : start + count]
                active.copy_((1 - momentum) * active.double() + momentum * batch[offset : offset + count])
    full_scale, full_shift = (cut_optional(v, 0, of_channels, channels) for v in (weight, bias))
    scale = invstd if full_scale is None else full_scale.double() * invstd
    center = mean.float().double()
    lost = (center - mean) * scale
    return torch.stack([mean, invstd]), torch.stack(
        [center, scale, lost if full_shift is None else full_shift.double() + lost]
    ).float()


@torch.library.register_fake("fastslim::batch_norm_finalize")
def _fake(
    partials, rows, rows_per_chunk, weight, bias, running_mean, running_var, momentum, eps, segments
) -> tuple[Tensor, Tensor]:
    channels = partials.shape[2]
    return partials.new_empty(2, channels, dtype=torch.float64), partials.new_empty(3, channels)


# CUDA's kernel, where it is built, goes before it.
_LIBRARY.impl("batch_norm_finalize", batch_norm_finalize_reference, "CompositeExplicitAutograd")
