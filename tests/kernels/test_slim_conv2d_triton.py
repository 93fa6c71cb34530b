"""Implicit matrix product of convolutions against float64, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from matmul_cases import DTYPES, TINY, assert_close, full_weight, nan, prologue_of, statistics

from fastslim.kernels.conv_taps import phase_taps
from fastslim.kernels.slim_conv2d import launch_slim_conv2d_bwd_weight, launch_slim_conv2d_fwd

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="launchers are called on CPU tensors")

# c_in, c_out, kernel, stride, padding, dilation, size
CASES = {
    "3x3": (20, 18, (3, 3), (1, 1), (1, 1), (1, 1), (5, 3)),
    "3x3-stride2-odd": (7, 3, (3, 3), (2, 2), (1, 1), (1, 1), (7, 6)),
    "1x1-stride2": (17, 9, (1, 1), (2, 2), (0, 0), (1, 1), (5, 5)),
    "5x5-stride2": (3, 8, (5, 5), (2, 2), (2, 2), (1, 1), (6, 5)),
    "1x3-mixed": (5, 16, (1, 3), (1, 2), (0, 2), (1, 1), (3, 7)),
    "3x3-dilated-stride2": (4, 5, (3, 3), (2, 2), (2, 2), (2, 2), (7, 7)),
    "3x3-stride3-dilated": (4, 5, (3, 3), (3, 3), (1, 1), (2, 2), (8, 8)),
    "one-channel": (1, 1, (3, 3), (1, 1), (0, 0), (1, 1), (3, 3)),
}
SETTINGS = ("stride", "padding", "dilation")


def channels_last(*shape, dtype=torch.float32):
    return nan(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def operands(case, dtype, weight_format=torch.channels_last):
    c_in, c_out, kernel, *settings, size = case
    torch.manual_seed(c_in)
    x = torch.randn(2, c_in, *size).to(dtype).contiguous(memory_format=torch.channels_last)
    full = full_weight(c_out, c_in, kernel, dtype).contiguous(memory_format=weight_format)
    return x, full, full[:c_out, :c_in], dict(zip(SETTINGS, settings, strict=True))


def rows(t):
    return t.permute(0, 2, 3, 1).flatten(0, 2)


@pytest.mark.parametrize(
    ("dtype", "weight_format"),
    list(zip(DTYPES, [torch.contiguous_format, torch.channels_last], strict=True)),
    ids=["float32-contiguous", "float16-channels_last"],
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_backward_read_the_prefix_in_place(case, dtype, weight_format) -> None:
    x, full, weight, settings = operands(case, dtype, weight_format)
    bias = torch.randn(weight.shape[0]).to(dtype)
    x_true, w_true = (t.double().requires_grad_() for t in (x, weight.contiguous()))
    true = F.conv2d(x_true, w_true, bias.double(), **settings)
    y = channels_last(*true.shape, dtype=dtype)
    launch_slim_conv2d_fwd(x, weight, y, **settings, bias=bias, tile=TINY)
    depth = weight[0].numel()
    assert_close(y, true.detach(), depth)
    dy = torch.randn(true.shape).to(dtype).contiguous(memory_format=torch.channels_last)
    true.backward(dy.double())
    dx = channels_last(*x.shape, dtype=dtype)
    launch_slim_conv2d_fwd(dy, weight, dx, **settings, transposed=True, tile=TINY)
    assert_close(dx, x_true.grad, depth)
    before = torch.randn(full.shape).contiguous(memory_format=weight_format)
    c_out, c_in = weight.shape[:2]
    count = dy.numel() // c_out
    add = dtype is torch.float16
    splits = (-(-count // 16), 16) if add else (1, count)
    gradient = before.clone(memory_format=torch.preserve_format)
    if not add:
        gradient[:c_out, :c_in] = float("nan")
    region = gradient[:c_out, :c_in]
    launch_slim_conv2d_bwd_weight(dy, x, region, **settings, add=add, tile=TINY, splits=splits)
    assert_close(region, w_true.grad + (before[:c_out, :c_in].double() if add else 0), count)
    gradient[:c_out, :c_in] = before[:c_out, :c_in]
    assert torch.equal(gradient, before)


def test_prologue_pads_after_the_activation_and_statistics_are_those_of_the_rounded_values() -> None:
    x, _, weight, settings = operands(CASES["3x3"], torch.float16)
    prologue = torch.randn(3, 20) + 1
    seen = prologue_of(x.permute(0, 2, 3, 1), prologue, 1).permute(0, 3, 1, 2)
    seen, w_true = seen.double(), weight.double().requires_grad_()
    true = F.conv2d(seen, w_true, **settings)
    y, stats = channels_last(*true.shape, dtype=torch.float16), nan(2, 3, 18)
    launch_slim_conv2d_fwd(x, weight, y, **settings, prologue=prologue, activation=1, stats=stats, tile=TINY)
    assert_close(y, true.detach(), 180)
    torch.testing.assert_close(stats.double(), statistics(rows(y), TINY.m), rtol=1e-5, atol=1e-4)
    dy = torch.randn(true.shape).half().contiguous(memory_format=torch.channels_last)
    true.backward(dy.double())
    gradient = nan(*weight.shape)
    launch_slim_conv2d_bwd_weight(
        dy, x, gradient, **settings, add=False, prologue=prologue, activation=1, tile=TINY, splits=(2, 16)
    )
    assert_close(gradient, w_true.grad, 30)


@pytest.mark.parametrize("case", ["3x3", "3x3-stride2-odd"])
def test_backward_input_masks_by_the_saved_output(case) -> None:
    saved, _, weight, settings = operands(CASES[case], torch.float32)
    saved = saved.mul(5).clamp(0, 6)
    x = saved.double().requires_grad_()
    y = F.conv2d(x, weight.double(), **settings)
    dy = torch.randn(y.shape).contiguous(memory_format=torch.channels_last)
    y.backward(dy.double())
    dx = channels_last(*saved.shape)
    options = dict(saved=saved, saved_activation=2, tile=TINY)
    launch_slim_conv2d_fwd(dy, weight, dx, **settings, transposed=True, **options)
    assert_close(dx, x.grad * (saved > 0) * (saved < 6), 200)


def test_slices_of_channels_are_read_and_written_in_place_and_pieces_add_up() -> None:
    wide = torch.randn(2, 5, 3, 30).permute(0, 3, 1, 2)  # channels_last; its first 20 channels are the input
    x, (_, _, weight, settings) = wide[:, :20], operands(CASES["3x3"], torch.float32)
    memory = torch.randn(2, 5, 3, 25).permute(0, 3, 1, 2)
    before, y = memory.clone(), memory[:, :18]
    launch_slim_conv2d_fwd(x[:, :8], weight[:, :8], y, **settings, tile=TINY)
    launch_slim_conv2d_fwd(x[:, 8:], weight[:, 8:], y, addend=y, **settings, tile=TINY)
    assert_close(y, F.conv2d(x.double(), weight.double(), **settings), 180)
    assert torch.equal(memory[:, 18:], before[:, 18:])


def test_widths_in_device_memory_give_what_the_host_widths_give() -> None:
    (c_in, c_out), (most_in, most_out) = (13, 21), (20, 40)
    settings = dict(stride=(2, 2), padding=(1, 1), dilation=(1, 1))
    weight = torch.randn(most_out, most_in, 3, 3)
    active, options = weight[:c_out, :c_in], dict(widths=torch.tensor([c_in, c_out], dtype=torch.int32), tile=TINY)

    def dense(values, most):  # in memory for the largest width, whose rest is never touched
        memory = channels_last(2, most, *values.shape[2:])
        rows(memory).view(-1)[: values.numel()] = rows(values).reshape(-1)
        return memory

    x, dy = (torch.randn(2, c, s, s) for c, s in ((c_in, 7), (c_out, 4)))
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    y, y_host = channels_last(2, most_out, 4, 4), channels_last(2, c_out, 4, 4)
    launch_slim_conv2d_fwd(dense(x, most_in), weight, y, **settings, **options)
    launch_slim_conv2d_fwd(x, active, y_host, **settings, tile=TINY)
    dx, dx_host = channels_last(2, most_in, 7, 7), channels_last(2, c_in, 7, 7)
    launch_slim_conv2d_fwd(dense(dy, most_out), weight, dx, **settings, transposed=True, **options)
    launch_slim_conv2d_fwd(dy, active, dx_host, **settings, transposed=True, tile=TINY)
    for found, host in ((y, y_host), (dx, dx_host)):
        assert torch.equal(rows(found).view(-1)[: host.numel()], rows(host).reshape(-1))
        assert rows(found).view(-1)[host.numel() :].isnan().all()
    gradient, gradient_host = nan(*weight.shape), nan(*active.shape)
    launch_slim_conv2d_bwd_weight(dense(dy, most_out), dense(x, most_in), gradient, **settings, **options, add=False)
    launch_slim_conv2d_bwd_weight(dy, x, gradient_host, **settings, add=False, tile=TINY, splits=(1, 32))
    assert torch.equal(gradient[:c_out, :c_in], gradient_host)
    gradient[:c_out, :c_in] = float("nan")
    assert gradient.isnan().all()


def test_chosen_tiles_compute_the_same_and_repeat_bit_by_bit() -> None:
    x = torch.randn(1, 72, 12, 12).half().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(40, 72, 3, 3).half().contiguous(memory_format=torch.channels_last)
    settings = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    true = F.conv2d(x.double(), weight.double(), padding=1)
    found = []
    for _ in range(2):
        y, gradient = channels_last(*true.shape, dtype=torch.float16), nan(*weight.shape)
        launch_slim_conv2d_fwd(x, weight, y, **settings)
        launch_slim_conv2d_bwd_weight(y, x, gradient, **settings, add=False)
        found.append((y, gradient))
    assert_close(found[0][0], true, 648)
    assert all(map(torch.equal, *found))


def test_phases_share_the_taps_and_the_pixels_out() -> None:
    for size, kernel, stride, padding, dilation in [(7, 3, 2, 1, 1), (8, 3, 3, 1, 2), (9, 5, 2, 2, 2), (4, 1, 2, 0, 1)]:
        found = set()
        for phase in range(stride):
            taps = phase_taps(phase, size, kernel, stride, padding, dilation)
            for h in range(taps.size):
                for t in range(taps.taps):
                    read = taps.origin + taps.pace * h + taps.reach * t
                    found.add((taps.to + taps.step * h, taps.first + taps.skip * t, read))
        outputs = range(-kernel * dilation, size + padding + 1)
        wanted = {(y * stride - padding + r * dilation, r, y) for y in outputs for r in range(kernel)}
        assert found == {entry for entry in wanted if 0 <= entry[0] < size}
