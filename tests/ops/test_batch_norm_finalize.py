"""batch_norm_finalize: what is merged out of partial sums is what batch_norm_act computes of the whole."""

from __future__ import annotations

import pytest
import torch

from fastslim.ops import batch_norm_finalize  # noqa: F401  (defines the op)

SEGMENTS = {"prefix": [], "segments": [1, 3, 6, 2]}


def partial_sums(x: torch.Tensor, rows_per_chunk: int) -> torch.Tensor:
    """Of every chunk its first row, and the sums of the differences from it and of their squares."""
    chunks = [chunk.double() for chunk in x.split(rows_per_chunk)]
    return torch.stack([torch.stack([c[0], (c - c[0]).sum(0), (c - c[0]).square().sum(0)]) for c in chunks]).float()


def arguments(rows_per_chunk: int, segments: list[int]) -> tuple:
    """x, and the op's arguments; parameters are NaN where no channel is active."""
    torch.manual_seed(0)
    x = torch.randn(23, 5) + 1e3
    active = [
        c for start, count in zip(segments[::2], segments[1::2], strict=True) for c in range(start, start + count)
    ]
    vectors = [torch.full((9,), torch.nan) for _ in range(4)]
    for vector in vectors:
        vector[active or slice(0, 5)] = torch.rand(5) + 0.5
    return x, (partial_sums(x, rows_per_chunk), len(x), rows_per_chunk, *vectors, 0.3, 1e-4, segments)


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("rows_per_chunk", [1, 6, 23, 40])
def test_partial_sums_give_what_the_whole_gives(rows_per_chunk, segments):
    x, call = arguments(rows_per_chunk, segments)
    weight, bias, mean, var = (v.clone() for v in call[3:7])
    y, truth = torch.ops.fastslim.batch_norm_act(x, weight, bias, mean, var, None, True, 0.3, 1e-4, 0, segments)
    stats, (center, scale, shift) = torch.ops.fastslim.batch_norm_finalize(*call)
    torch.testing.assert_close(stats, truth, rtol=1e-6, atol=0)
    torch.testing.assert_close((x - center) * scale + shift, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(call[5], mean, equal_nan=True)
    torch.testing.assert_close(call[6], var, equal_nan=True)


def test_without_parameters_it_normalises_only():
    x, call = arguments(6, [])
    _, (center, scale, shift) = torch.ops.fastslim.batch_norm_finalize(*call[:3], None, None, None, None, *call[7:])
    y = (x - center) * scale + shift
    torch.testing.assert_close(y.mean(0), torch.zeros(5), rtol=0, atol=1e-4)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(5), rtol=1e-3, atol=0)


def test_opcheck():
    _, call = arguments(6, SEGMENTS["segments"])
    call = tuple(torch.nan_to_num(a, 1.0) if isinstance(a, torch.Tensor) else a for a in call)
    torch.library.opcheck(torch.ops.fastslim.batch_norm_finalize.default, call)
