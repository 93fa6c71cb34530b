"""The CUDA kernels of depthwise_conv2d: run on the CPU always, compiled where nvcc is, run on a GPU if there is one."""

from __future__ import annotations

import pytest
import resources
import torch
from depthwise_conv2d_cases import CLAMPS, DTYPES, Case, Layer, run_emulated
from emulation import emulated

GENERAL = {
    "3x3": Layer(2, ((0, 7),), (6, 5)),
    "prefix_stride2": Layer(3, ((0, 5),), (9, 7), stride=(2, 2)),
    "5x5_uneven": Layer(1, ((0, 1),), (8, 7), (5, 3), (2, 1), (2, 0), (1, 2), 2),
    "segments": Layer(2, ((0, 2), (4, 3)), (5, 5), padding=(0, 1), multiplier=2),
    "many_pixels": Layer(5, ((0, 2),), (17, 13)),
    "batch_0": Layer(0, ((0, 4),), (5, 5)),
}
# Widths that take 8, 4, 2 and 1 channels a thread; tails of strips and of channel tiles; every kernel and stride.
VECTORS = {
    "3x3": Layer(2, ((0, 24),), (6, 5), full=32),
    "3x3_stride2_even": Layer(2, ((0, 8),), (8, 10), stride=(2, 2), full=9),
    "3x3_stride2_odd": Layer(3, ((0, 16),), (9, 7), stride=(2, 2), full=16),
    "3x3_two_channel_tiles": Layer(1, ((0, 264),), (2, 3), full=264),
    "3x3_no_padding": Layer(2, ((0, 8),), (5, 6), padding=(0, 0), full=8),
    "3x3_wide_padding": Layer(1, ((0, 8),), (4, 5), stride=(2, 2), padding=(3, 2), full=8),
    "3x3_padding_beyond_kernel": Layer(1, ((0, 8),), (3, 4), padding=(3, 3), full=8),
    "3x3_segments": Layer(2, ((0, 4), (9, 12)), (5, 5), full=24),
    "3x3_odd_width": Layer(2, ((0, 7),), (5, 9), full=7),
    "3x3_even_width": Layer(2, ((0, 6),), (5, 9), stride=(2, 2), full=7),
    "5x5": Layer(2, ((0, 16),), (7, 7), (5, 5), padding=(2, 2), full=24),
    "5x5_stride2": Layer(2, ((0, 8),), (9, 6), (5, 5), (2, 2), (2, 2), full=8),
    "5x5_narrow": Layer(1, ((0, 3),), (6, 6), (5, 5), (2, 2), (2, 2), full=5),
    "7x7": Layer(1, ((0, 16),), (8, 9), (7, 7), padding=(3, 3), full=16),
    "7x7_stride2": Layer(1, ((0, 8),), (11, 9), (7, 7), (2, 2), (3, 3), full=8),
    "smaller_than_the_kernel": Layer(2, ((0, 8),), (2, 1), (7, 7), padding=(3, 3), full=8),
    "many_rows": Layer(40, ((0, 8),), (27, 5), full=8),
    "batch_0": Layer(0, ((0, 8),), (5, 5), full=8),
}
STATISTICS = ["3x3", "3x3_stride2_odd", "3x3_two_channel_tiles", "3x3_odd_width", "5x5", "7x7_stride2", "many_rows"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated("depthwise_conv2d", tmp_path_factory.mktemp("emulation"), "depthwise_conv2d*.cu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", GENERAL)
def test_kernels_run_by_the_host_agree_with_torch(library, name, channels_last, dtype):
    case = Case(GENERAL[name], dtype, channels_last)
    case.check(run_emulated(library, case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", VECTORS)
def test_vector_kernels_run_by_the_host_agree_with_torch(library, name, dtype):
    case = Case(VECTORS[name], dtype, channels_last=True)
    assert library.has_vectors(case.numbers())
    case.check(run_emulated(library, case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", CLAMPS)
@pytest.mark.parametrize("name", STATISTICS)
def test_prologue_and_statistics_agree_with_torch(library, name, activation, dtype):
    case = Case(VECTORS[name], dtype, channels_last=True, activation=activation)
    *results, partials = run_emulated(library, case)
    case.check(results)
    rows = -(-VECTORS[name].batch * case.grad_y.shape[2] // len(partials)) * case.grad_y.shape[3]
    check_statistics(partials, results[0], rows)


def check_statistics(partials: torch.Tensor, y: torch.Tensor, rows: int) -> None:
    """The partial sums are those of the rounded output: chunks of `rows` pixels, the last may be smaller."""
    chunks = y.permute(0, 2, 3, 1).reshape(-1, y.shape[1]).split(rows)
    assert len(chunks) == len(partials)
    for chunk, (shift, total, squares) in zip(chunks, partials, strict=True):
        assert torch.equal(shift, chunk[0].float())
        difference = chunk.double() - chunk[0].double()
        torch.testing.assert_close(total.double(), difference.sum(0), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(squares.double(), difference.square().sum(0), rtol=1e-5, atol=1e-4)


def test_statistics_are_exact_with_large_means(library):
    case = Case(VECTORS["many_rows"], torch.float32, channels_last=True, activation="none")
    case.bias.add_(1e4)
    case.weight.mul_(0.1)
    y, *_, partials = run_emulated(library, case)
    rows = -(-40 * 27 // len(partials)) * 5
    values = y.permute(0, 2, 3, 1).reshape(-1, 8).double()
    counts = torch.tensor([len(chunk) for chunk in values.split(rows)], dtype=torch.float64)[:, None]
    shift, total, squares = partials.double().unbind(1)
    mean = (shift * counts + total).sum(0) / len(values)
    chunk_mean = shift + total / counts
    variance = (squares - total**2 / counts + counts * (chunk_mean - mean) ** 2).sum(0) / len(values)
    torch.testing.assert_close(variance, values.var(0, correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["3x3", "3x3_stride2_odd", "5x5"])
def test_a_vector_at_an_odd_address_takes_narrow_accesses(library, name):
    case = Case(VECTORS[name], torch.bfloat16, channels_last=True)
    for what in ("x", "grad_y"):
        image = getattr(case, what)
        memory = torch.empty(image.numel() + 1, dtype=image.dtype)
        setattr(case, what, memory[1:].as_strided(image.shape, image.stride(), 1).copy_(image))
    case.check(run_emulated(library, case))


def test_one_image_out_of_a_batch_with_gaps_takes_vectors(library):
    case = Case(VECTORS["5x5"]._replace(batch=1), torch.bfloat16, channels_last=True, activation="relu")
    for what in ("x", "grad_y"):
        image = getattr(case, what)
        stride = (3 * image.numel(), *image.stride()[1:])
        setattr(case, what, image.as_strided(image.shape, stride))
    assert library.has_vectors(case.numbers())
    case.check(run_emulated(library, case)[:4])


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("name", ["3x3", "3x3_odd_width", "5x5_stride2", "batch_0"])
def test_width_in_device_memory_gives_the_same(library, name, activation):
    case = Case(VECTORS[name], torch.float32, channels_last=True, activation=activation)
    from_host = run_emulated(library, case)
    from_device = run_emulated(library, case, width=case.x.shape[1], most=case.x.shape[1] + 20)
    assert all(torch.equal(a, b) for a, b in zip(from_host[:2], from_device[:2], strict=True))
    for a, b in zip(from_host[2:], from_device[2:], strict=True):  # other blocks, other order of sums
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_general_kernels_take_a_width_in_device_memory(library, channels_last):
    case = Case(GENERAL["5x5_uneven"], torch.float64, channels_last)
    case.check(run_emulated(library, case, width=1, most=5))


def test_repeats_are_bitwise_equal(library):
    for name, layers in (("many_pixels", GENERAL), ("many_rows", VECTORS)):
        case = Case(layers[name], torch.float32, True)
        first, second = run_emulated(library, case), run_emulated(library, case)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def problems(kernels: tuple[resources.Resources, ...]) -> dict[str, list[str]]:
    return {kernel.name: kernel.problems() for kernel in kernels if kernel.problems()}


@pytest.mark.skipif(not resources.tool("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_general_kernels_compile_within_the_chips_limits(architecture):
    kernels = resources.cuda_resources("depthwise_conv2d", architecture)
    assert problems(kernels) == {}
    assert len(kernels) == 12  # three kernels in four dtypes
    assert max(kernel.registers for kernel in kernels) <= 64


@pytest.mark.skipif(not resources.tool("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
@pytest.mark.parametrize("stem", ["", "_backward_input", "_backward_weight"])
def test_vector_kernels_compile_to_wide_accesses_without_spills(stem, architecture):
    kernels = resources.cuda_resources(f"depthwise_conv2d_vector{stem}", architecture)
    assert problems(kernels) == {}
    full = [kernel for kernel in kernels if "float, 4," in kernel.name or "16, 8," in kernel.name]
    assert len(full) >= 9
    assert all(kernel.wide >= 3 for kernel in full)
    three = [kernel for kernel in full if ", 3" in kernel.name]
    assert all(kernel.occupancy >= 0.25 for kernel in three), "512 threads keep enough loads in flight"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", [*GENERAL, *(f"vector {name}" for name in VECTORS)])
def test_kernels_on_the_gpu_agree_with_torch(name, channels_last, dtype):
    import fastslim  # noqa: F401  (registers the ops)

    layer = VECTORS[name.removeprefix("vector ")] if name.startswith("vector") else GENERAL[name]
    case = Case(layer, dtype, channels_last, device="cuda")
    ops = torch.ops.fastslim
    segments = [number for segment in layer.segments for number in segment]
    conv = (layer.stride, layer.padding, layer.dilation, segments, layer.multiplier)
    gradient_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    grad_weight = case.before.to(gradient_dtype, copy=True)
    grad_bias = case.bias_before.to(gradient_dtype, copy=True)
    y = ops.depthwise_conv2d(case.x, case.weight, case.bias, *conv)
    grad_x = ops.depthwise_conv2d_backward_input(case.grad_y, case.weight, case.x.shape, channels_last, *conv)
    ops.depthwise_conv2d_backward_weight(case.grad_y, case.x, grad_weight, grad_bias, *conv, True, True)
    case.check([y, grad_x, grad_weight, grad_bias])
