"""Transfers that the tests of prefix_pack's reference, CUDA and Triton kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

from fastslim.ops.prefix_pack import Transfer

CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last


def image(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format = CONTIGUOUS) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=layout)


def prefix(
    full: tuple[int, ...], active: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format = CONTIGUOUS
) -> Tensor:
    """A prefix of a tensor that is NaN beyond it."""
    whole = torch.full(full, torch.nan, dtype=dtype).contiguous(memory_format=layout)
    region = tuple(map(slice, active))
    whole[region] = torch.randn(active).to(dtype)
    return whole[region]


def weight_packs(low: torch.dtype) -> list[Transfer]:
    """Prefixes of float32 weights to dense ones in low precision, as a pass begins."""
    pairs = [  # full and active shape, layout of the parameter, layout of the pack
        ((16, 12, 3, 3), (9, 8, 3, 3), LAST, LAST),
        ((16, 12, 3, 3), (9, 8, 3, 3), CONTIGUOUS, LAST),
        ((16, 12, 3, 3), (16, 12, 3, 3), CONTIGUOUS, CONTIGUOUS),
        ((16, 12, 3, 3), (16, 12, 3, 3), LAST, LAST),
        ((7, 65, 1, 1), (3, 63, 1, 1), LAST, LAST),
        ((80, 72, 1, 1), (64, 72, 1, 1), CONTIGUOUS, LAST),  # two tiles
        ((24, 1, 5, 5), (17, 1, 5, 5), CONTIGUOUS, CONTIGUOUS),
        ((3, 40), (1, 37), CONTIGUOUS, CONTIGUOUS),
        ((65,), (63,), CONTIGUOUS, CONTIGUOUS),
    ]
    return [
        Transfer(
            prefix(full, active, torch.float32, layout),
            torch.full(active, torch.nan, dtype=low).contiguous(memory_format=packed),
        )
        for full, active, layout, packed in pairs
    ]


def gradient_adds(low: torch.dtype) -> list[Transfer]:
    """Dense gradients in low precision to prefixes of float32 ones, as a pass ends; the third overwrites."""
    return [
        Transfer(image((9, 8, 3, 3), low, LAST), prefix((16, 12, 3, 3), (9, 8, 3, 3), torch.float32, LAST), True),
        Transfer(image((9, 7, 3, 3), low, LAST), prefix((16, 12, 3, 3), (9, 7, 3, 3), torch.float32), True),
        Transfer(image((9, 7, 3, 3), low, LAST), prefix((16, 12, 3, 3), (9, 7, 3, 3), torch.float32)),
        Transfer(image((66, 68), low), prefix((70, 72), (66, 68), torch.float32), True),  # two tiles
        Transfer(image((63,), torch.float32), prefix((64,), (63,), torch.float32), True),
        Transfer(image((10,), torch.float32), prefix((64,), (10,), torch.float32), True),  # whole fours and a rest
        Transfer(image((6, 5), torch.float32), image((6, 8), torch.float32)[:, :5], True),
    ]


def odd_ones(low: torch.dtype) -> list[Transfer]:
    """Shapes and layouts that no layer has, but a caller may."""
    return [
        Transfer(torch.randn(()), torch.tensor(1.5, dtype=low), True),
        Transfer(torch.randn(0, 3), torch.empty(0, 3, dtype=low)),
        Transfer(torch.randn(5, 6).t(), torch.empty(6, 5, dtype=low)),
        Transfer(torch.randn(3, 1).expand(3, 8), torch.empty(3, 8, dtype=low)),
        Transfer(torch.randn(4, 20)[:, 1::2], torch.zeros(4, 20, dtype=low)[:, ::2], True),
        Transfer(torch.randn(33)[1:], torch.zeros(40, dtype=low)[3:35], True),  # aligned to an element only
        Transfer(torch.randn(2, 3, 4, 5, 6), torch.empty(2, 3, 4, 5, 6, dtype=low)),
        Transfer(torch.randn(6, 4).to(low), torch.randn(6, 4).to(low), True),
        Transfer(image((16, 24, 3, 3), low, LAST)[:8, :16], image((8, 16, 3, 3), low, LAST)),  # pairs of 16 bits
        Transfer(prefix((9, 20), (9, 10), low), torch.empty(9, 12, dtype=low)[:, 2:]),
        Transfer(prefix((9, 20), (9, 10), low), torch.empty(9, 11, dtype=low)[:, 1:]),
        Transfer(torch.tensor([1e6, -0.0, 3.0, torch.inf]), torch.empty(4, dtype=low)),
    ]


def double_ones(low: torch.dtype) -> list[Transfer]:
    """Sums in float64, of and into every other type."""
    return [
        Transfer(torch.randn(3, 70).double(), torch.randn(3, 70).double(), True),
        Transfer(torch.randn(3, 7).to(low), torch.randn(3, 9).double()[:, :7], True),
        Transfer(torch.randn(3, 7).double(), torch.randn(3, 7).to(low)),
        Transfer(torch.randn(16, 8).double(), torch.randn(16, 8).to(low)),
    ]


KINDS = {"weights": weight_packs, "gradients": gradient_adds, "odd": odd_ones, "float64": double_ones}


def copied(transfers: list[Transfer]) -> list[Transfer]:
    """The same transfers to memory of their own; all around a region is kept, so that it can be compared."""
    copies = []
    for transfer in transfers:
        target = transfer.target
        whole = torch.empty(0, dtype=target.dtype).set_(target.untyped_storage()).clone()
        copies.append(
            transfer._replace(target=whole.as_strided(target.shape, target.stride(), target.storage_offset()))
        )
    return copies


def memory(transfer: Transfer) -> Tensor:
    """All the memory a target lies in, the elements outside of it too, as bits."""
    target = transfer.target
    return torch.empty(0, dtype=torch.uint8).set_(target.untyped_storage())


def assert_same_memory(ours: list[Transfer], expected: list[Transfer]) -> None:
    """Rounding once is exact arithmetic's only freedom here, so results are equal in every bit."""
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert torch.equal(a.target, b.target) or torch.equal(a.target.isnan(), b.target.isnan()), i
        assert torch.equal(memory(a), memory(b)), f"transfer {i}: {tuple(a.target.shape)}"


def full_size(low: torch.dtype, dense: str) -> list[Transfer]:
    """Full-size transfers, one side of each to be packed for the widths; the other is a parameter."""
    shapes = [
        ((24, 16, 3, 3), LAST, LAST),
        ((24, 16, 3, 3), CONTIGUOUS, LAST),
        ((24, 16, 3, 3), LAST, CONTIGUOUS),
        ((16, 1, 3, 3), CONTIGUOUS, CONTIGUOUS),
        ((12, 10, 1, 1), CONTIGUOUS, LAST),
        ((96, 64), CONTIGUOUS, CONTIGUOUS),
        ((20,), CONTIGUOUS, CONTIGUOUS),
        ((6, 4, 2), CONTIGUOUS, CONTIGUOUS),
        ((), CONTIGUOUS, CONTIGUOUS),
    ]

    def made(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
        return image(shape, dtype, layout if len(shape) == 4 else CONTIGUOUS)

    if dense == "target":
        return [Transfer(made(s, torch.float32, a), made(s, low, b)) for s, a, b in shapes]
    return [Transfer(made(s, low, b), made(s, torch.float32, a), True) for s, a, b in shapes]


WIDTHS = {  # active c_out, c_in of each
    "even": [(16, 8), (16, 8), (16, 8), (8, 1), (8, 4), (64, 32), (12, 0), (4, 2), (0, 0)],
    "odd": [(7, 5), (1, 16), (24, 1), (3, 1), (5, 9), (95, 63), (19, 0), (5, 3), (9, 9)],
    "full": [(24, 16), (24, 16), (24, 16), (16, 1), (12, 10), (96, 64), (20, 7), (6, 4), (1, 1)],
    "none_or_too_many": [(0, 8), (9, 0), (-1, 4), (99, 1), (12, 99), (0, 0), (2**31 - 1, 1), (6, 2**31 - 1), (1, 1)],
}
