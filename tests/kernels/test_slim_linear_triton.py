"""Matrix kernels on strided full weights against float64, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from matmul_cases import DTYPES, TINY, assert_close, full_weight, nan, prologue_of, statistics

from fastslim.kernels import matmul_tiles as tiles
from fastslim.kernels.slim_linear import launch_slim_linear_bwd_weight, launch_slim_linear_fwd

SIZES = [(65, 40, 24), (33, 7, 63), (1, 1, 1), (3, 65, 3), (50, 16, 48)]  # rows, c_in, c_out
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="launchers are called on CPU tensors")
pytestmark = needs_interpreter


def operands(rows, c_in, c_out, dtype):
    torch.manual_seed(rows + c_in)
    return torch.randn(rows, c_in).to(dtype), full_weight(c_out, c_in, dtype=dtype), torch.randn(c_out).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_reads_the_prefix_in_place(size, dtype) -> None:
    rows, c_in, c_out = size
    x, weight, bias = operands(*size, dtype)
    active = weight[:c_out, :c_in]
    y = nan(rows, c_out, dtype=dtype)
    launch_slim_linear_fwd(x, active.t(), y, bias=bias, tile=TINY)
    assert_close(y, x.double() @ active.double().t() + bias.double(), c_in)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_backward_input_masks_by_the_saved_output(size, dtype) -> None:
    rows, c_in, c_out = size
    saved, weight, _ = operands(*size, dtype)
    saved = saved.mul(5).clamp(0, 6)
    dy = torch.randn(rows, c_out).to(dtype)
    true = dy.double() @ weight[:c_out, :c_in].double()
    for activation, keep in ((0, True), (1, saved > 0), (2, (saved > 0) & (saved < 6))):
        dx = nan(rows, c_in, dtype=dtype)
        masked = {"saved": saved, "saved_activation": activation} if activation else {}
        launch_slim_linear_fwd(dy, weight[:c_out, :c_in], dx, transposed=True, tile=TINY, **masked)
        assert_close(dx, true * keep, c_out)


@pytest.mark.parametrize("splits", [(1, 80), (3, 32), None], ids=str)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("size", SIZES[:2], ids=str)
def test_backward_weight_writes_or_adds_only_to_the_prefix(size, add, splits) -> None:
    rows, c_in, c_out = size
    x, dy = torch.randn(rows, c_in), torch.randn(rows, c_out)
    before = torch.randn(c_out + 5, c_in + 9)
    gradient = before.clone()
    if not add:
        gradient[:c_out, :c_in] = float("nan")
    launch_slim_linear_bwd_weight(dy, x, gradient[:c_out, :c_in], add=add, tile=TINY, splits=splits)
    true = dy.double().t() @ x.double() + (before[:c_out, :c_in].double() if add else 0)
    assert_close(gradient[:c_out, :c_in], true, rows)
    gradient[:c_out, :c_in] = before[:c_out, :c_in]
    assert torch.equal(gradient, before)


def test_sums_are_cut_by_size_alone_and_repeat_bit_by_bit() -> None:
    x, dy = torch.randn(300, 20), torch.randn(300, 33)
    found = []
    for _ in range(2):
        gradient = nan(33, 20)
        launch_slim_linear_bwd_weight(dy, x, gradient, add=False)
        found.append(gradient)
    assert tiles.choose_splits(300, 1, tiles.SMALL)[0] > 1
    assert_close(found[0], dy.double().t() @ x.double(), 300)
    assert torch.equal(*found)


@pytest.mark.parametrize("activation", [0, 2, 3, 4])
def test_prologue_and_statistics_are_those_of_the_rounded_values(activation) -> None:
    (rows, c_in, c_out), dtype = (34, 23, 19), torch.float16
    x, weight, bias = operands(rows, c_in, c_out, dtype)
    prologue, active = torch.randn(3, c_in), weight[:c_out, :c_in]
    y, stats = nan(rows, c_out, dtype=dtype), nan(3, 3, c_out)
    launch_slim_linear_fwd(
        x, active.t(), y, bias=bias, prologue=prologue, activation=activation, stats=stats, tile=TINY
    )
    seen = prologue_of(x, prologue, activation)
    assert_close(y, seen.double() @ active.double().t() + bias.double(), c_in)
    torch.testing.assert_close(stats.double(), statistics(y, TINY.m), rtol=1e-5, atol=1e-4)
    gradient, dy = nan(c_out, c_in), torch.randn(rows, c_out).to(dtype)
    launch_slim_linear_bwd_weight(
        dy, x, gradient, add=False, prologue=prologue, activation=activation, tile=TINY, splits=(2, 48)
    )
    assert_close(gradient, dy.double().t() @ seen.double(), rows)


def test_statistics_stay_exact_at_large_means() -> None:
    x, weight = torch.ones(64, 16), torch.zeros(8, 16)
    bias = torch.full((8,), 1e4)
    x[:, 0], weight[:, 0] = torch.randn(64), 1.0
    y, stats = nan(64, 8), nan(4, 3, 8)
    launch_slim_linear_fwd(x, weight.t(), y, bias=bias, stats=stats, tile=TINY)
    shift, total, squares = stats.double().unbind(1)
    mean = (16 * shift + total).sum(0) / 64
    chunk_mean = shift + total / 16
    variance = (squares - total**2 / 16 + 16 * (chunk_mean - mean) ** 2).sum(0) / 64
    torch.testing.assert_close(variance, y.double().var(0, unbiased=False), rtol=1e-5, atol=0)


def test_pieces_of_the_input_add_up_in_float32() -> None:
    x, weight, _ = operands(40, 30, 20, torch.float16)
    y, partial = nan(40, 20, dtype=torch.float16), nan(40, 20)
    launch_slim_linear_fwd(x[:, :14], weight[:20, :14].t(), partial, tile=TINY)
    launch_slim_linear_fwd(x[:, 14:], weight[:20, 14:30].t(), y, addend=partial, tile=TINY)
    assert_close(y, x.double() @ weight[:20, :30].double().t(), 30)


@pytest.mark.parametrize(("multiple", "c_in", "c_out"), [(1, 13, 21), (8, 24, 16)])
def test_widths_in_device_memory_give_what_the_host_widths_give(multiple, c_in, c_out) -> None:
    rows, most_in, most_out = 33, 40, 32
    weight = torch.randn(most_out, most_in)
    widths = torch.tensor([c_in, c_out], dtype=torch.int32)
    options = dict(widths=widths, width_multiple=multiple, tile=TINY)

    def dense(values):  # in memory for the largest width, whose rest is never touched
        memory = nan(rows, most_out if values.shape[1] == c_out else most_in)
        memory.view(-1)[: values.numel()] = values.view(-1)
        return memory

    x, dy = torch.randn(rows, c_in), torch.randn(rows, c_out)
    bias, stats = torch.randn(most_out), nan(3, 3, most_out)
    y, dx, gradient = nan(rows, most_out), nan(rows, most_in), nan(most_out, most_in)
    launch_slim_linear_fwd(dense(x), weight.t(), y, bias=bias, stats=stats, **options)
    launch_slim_linear_fwd(dense(dy), weight, dx, transposed=True, **options)
    launch_slim_linear_bwd_weight(dense(dy), dense(x), gradient, add=False, **options)
    y_host, dx_host, gradient_host, stats_host = nan(rows, c_out), nan(rows, c_in), nan(c_out, c_in), nan(3, 3, c_out)
    active = weight[:c_out, :c_in]
    launch_slim_linear_fwd(x, active.t(), y_host, bias=bias[:c_out], stats=stats_host, tile=TINY)
    launch_slim_linear_fwd(dy, active, dx_host, transposed=True, tile=TINY)
    launch_slim_linear_bwd_weight(dy, x, gradient_host, add=False, tile=TINY, splits=(1, rows))
    for found, host in ((y, y_host), (dx, dx_host), (stats, stats_host)):
        assert torch.equal(found.view(-1)[: host.numel()], host.view(-1))
        assert found.view(-1)[host.numel() :].isnan().all()
    assert torch.equal(gradient[:c_out, :c_in], gradient_host)
    gradient[:c_out, :c_in] = float("nan")
    assert gradient.isnan().all()


@pytest.mark.parametrize("tile", [*tiles.FORWARD_TILES, tiles.TF32, tiles.SMALL], ids=lambda tile: tile.name)
def test_every_tile_computes_the_same(tile) -> None:
    x, weight, bias = operands(140, 72, 40, torch.float16)
    active, y = weight[:40, :72], nan(140, 40, dtype=torch.float16)
    launch_slim_linear_fwd(x, active.t(), y, bias=bias, tile=tile)
    assert_close(y, x.double() @ active.double().t() + bias.double(), 72)


def test_float32_master_weights_are_read_as_16_bit() -> None:
    x, weight, y = torch.randn(9, 20).half(), full_weight(6, 20), nan(9, 6, dtype=torch.float16)
    launch_slim_linear_fwd(x, weight[:6, :20].t(), y, tile=TINY)
    assert_close(y, x.double() @ weight[:6, :20].half().double().t(), 20)


def test_empty_sizes_launch_nothing() -> None:
    launch_slim_linear_fwd(torch.empty(0, 4), torch.empty(4, 3), torch.empty(0, 3))
    gradient = torch.ones(3, 4)
    launch_slim_linear_bwd_weight(torch.empty(0, 3), torch.empty(0, 4), gradient, add=True)
    assert gradient.eq(1).all()
    launch_slim_linear_bwd_weight(torch.empty(0, 3), torch.empty(0, 4), gradient, add=False)
    assert not gradient.any()


HALF = tiles.Operands(2, 8)


@pytest.mark.parametrize(
    ("rows", "n", "operands", "options", "expected"),
    [
        (200704, 256, HALF, {}, tiles.WIDE),
        (200704, 256, HALF, {"fused": True}, tiles.SQUARE),
        (200704, 256, HALF, {"fused": True, "recorded": tiles.WIDE.name}, tiles.SQUARE),
        (200704, 256, HALF, {"recorded": tiles.NARROW.name}, tiles.NARROW),
        (200704, 256, HALF, {"recorded": "of another version"}, tiles.WIDE),
        (200704, 64, HALF, {}, tiles.NARROW),
        (3136, 512, HALF, {}, tiles.NARROW),
        (64, 1000, HALF, {}, tiles.NARROW),
        (200704, 256, tiles.Operands(2, 1), {"recorded": tiles.WIDE.name}, tiles.SMALL),
        (200704, 256, tiles.Operands(4, 4), {}, tiles.SMALL),
        (200704, 256, tiles.Operands(4, 4, "tf32"), {}, tiles.TF32),
    ],
)
def test_tile_is_chosen_by_shape(rows, n, operands, options, expected) -> None:
    assert tiles.choose_tile(rows, n, operands, **options) == expected


def test_every_forward_tile_makes_the_same_chunks_of_statistics() -> None:
    assert {tile.m for tile in (*tiles.FORWARD_TILES, tiles.TF32, tiles.SMALL)} == {tiles.CHUNK}


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (100, 3), (200704, 4), (10**6, 1000)])
def test_splits_cover_all_rows(rows, count) -> None:
    splits, rows_per_split = tiles.choose_splits(rows, count, tiles.SQUARE)
    assert (splits - 1) * rows_per_split < rows <= splits * rows_per_split
    assert splits * count <= max(tiles.FILLED, count)
