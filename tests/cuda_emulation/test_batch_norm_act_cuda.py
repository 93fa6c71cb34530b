"""The CUDA kernels of batch_norm_act: run on the CPU always, compiled where nvcc is, run on a GPU if there is one."""

from __future__ import annotations

import importlib

import pytest
import resources
import torch
from batch_norm_act_call import DTYPES, Emulated
from batch_norm_act_cases import check, doubled, run, tensors
from cases import LAYOUTS
from emulation import emulated
from torch.nn import functional as F

from fastslim.ops import backend
from fastslim.ops.batch_norm_act import ACTIVATIONS, batch_norm_act, batch_norm_act_reference
from fastslim.ops.batch_norm_finalize import batch_norm_finalize_reference

# One channel, few, 7x7; then odd, more than a block is wide, in several chunks, images in pieces.
SHAPES = [(6, 2, 5, 3), (9, 8, 1, 1), (5, 24, 7, 7)]
MORE_SHAPES = [(7, 1, 5, 3), (2, 3, 4, 4), (2, 40, 4, 6), (33, 65, 2, 2), (9, 264, 4, 4), (2, 2, 80, 96), (31, 17)]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated("batch_norm_act", tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def emulate(library, monkeypatch):
    """Makes the public op run on emulated kernels, made with these arguments."""

    def use(*arguments) -> Emulated:
        kernels = Emulated(library, *arguments)
        module = importlib.import_module("fastslim.ops.batch_norm_act")
        monkeypatch.setattr(module, "_op", lambda name, chosen: getattr(kernels, name))
        monkeypatch.setattr(backend, "choose", lambda *call: backend.Choice("cuda", "emulated"))
        return kernels

    return use


@pytest.fixture
def kernels(emulate):
    return emulate()


@by_dtype
@by_layout
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernels_run_by_the_host_are_as_exact_as_torch(kernels, dtype, layout, residual, activation):
    for shape in SHAPES:
        for training in (True, False):
            arguments, dy = tensors(shape, dtype, layout, residual=residual)
            check(arguments, dy, shape[1], training=training, activation=activation)


@by_dtype
@by_layout
@pytest.mark.parametrize("shape", MORE_SHAPES, ids=str)
def test_any_shape(kernels, dtype, layout, shape):
    arguments, dy = tensors(shape, dtype, layout, residual=True)
    check(arguments, dy, shape[1], activation="relu6")


@by_layout
def test_large_means_do_not_hurt_the_variance(kernels, layout):
    for outlier in (False, True):
        arguments, dy = tensors((6, 20, 31, 33), torch.float32, layout)
        arguments["x"] = arguments["x"] / 2 + 1e4
        if outlier:  # the first value of all, from which a chunk takes its shift
            arguments["x"][0, :, 0, 0] = 0.0
        ours = run(batch_norm_act, arguments, dy)
        truth = run(batch_norm_act_reference, doubled(arguments), dy.double())
        for name in ("running_mean", "running_var", "y", "dweight"):
            active = slice(None) if name == "y" else slice(0, 20)
            value, exact = ours[name][active].double(), truth[name][active]
            assert (value - exact).abs().max() <= 1e-5 * exact.abs().max(), name


@by_layout
@by_dtype
def test_segments_strides_and_other_dtypes_of_the_parameters(kernels, layout, dtype):
    arguments, dy = tensors((4, 7, 6, 5), dtype, layout, full=7)
    expected = run(batch_norm_act, arguments, dy, activation="relu")
    inside, wide = torch.tensor([0, 1, 2, 5, 6, 7, 8]), {}
    for name in ("weight", "bias", "running_mean", "running_var"):
        wide[name] = torch.full((24,), torch.nan, dtype=arguments[name].dtype)
        wide[name][2 * inside] = arguments[name]
    leaves = {name: vector[::2].requires_grad_(name in ("weight", "bias")) for name, vector in wide.items()}
    x = arguments["x"].requires_grad_()
    y = batch_norm_act(x, **leaves, training=True, momentum=0.3, eps=1e-4, activation="relu",
                       segments=((0, 3), (5, 4)))  # fmt: skip
    y.backward(dy)
    assert torch.equal(y, expected["y"]) and torch.equal(x.grad, expected["dx"])
    for name in ("weight", "bias"):
        assert torch.equal(leaves[name].grad[inside], expected[f"d{name}"])
        assert leaves[name].grad.count_nonzero() == expected[f"d{name}"].count_nonzero()
    for name in ("running_mean", "running_var"):
        assert torch.equal(leaves[name][inside], expected[name])
        assert wide[name].isnan().sum() == 24 - 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_of_x_own_dtype(kernels, dtype):
    arguments, dy = tensors((4, 9, 5, 5), dtype)
    for name in ("weight", "bias", "running_mean", "running_var"):
        arguments[name] = arguments[name].to(dtype)
    check(arguments, dy, 9, activation="relu")


@by_layout
def test_without_affine_and_without_running_statistics(kernels, layout):
    arguments, dy = tensors((5, 8, 4, 4), torch.float32, layout)
    arguments |= {"weight": None, "bias": None, "running_mean": None, "running_var": None}
    for training in (True, False):  # batch statistics in both
        check(arguments, dy, 8, training=training, activation="relu6")


@by_layout
def test_repeats_are_bitwise_equal(kernels, layout):
    arguments, dy = tensors((7, 24, 11, 12), torch.bfloat16, layout, residual=True)
    first, second = (run(batch_norm_act, arguments, dy, activation="silu") for _ in range(2))
    assert all(torch.equal(torch.nan_to_num(first[name]), torch.nan_to_num(second[name])) for name in first)


@by_dtype
@by_layout
def test_a_width_in_device_memory_gives_the_same_results(emulate, layout, dtype):
    arguments, dy = tensors((5, 24, 8, 4), dtype, layout, residual=True)
    emulate()
    expected = run(batch_norm_act, arguments, dy, activation="hardswish")
    emulate(16)  # the host only knows that there are 40 channels at most
    ours = run(batch_norm_act, arguments, dy, activation="hardswish")
    for name, value in expected.items():
        rounding = 8 * torch.finfo(value.dtype).eps
        torch.testing.assert_close(ours[name], value, rtol=rounding, atol=4 * rounding, equal_nan=True)


@by_layout
def test_memory_that_is_not_aligned_to_16_bytes(kernels, layout):
    arguments, dy = tensors((5, 24, 4, 4), torch.bfloat16, layout, residual=True)
    expected = run(batch_norm_act, arguments, dy, activation="silu")
    x = arguments["x"]
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].as_strided(x.shape, x.stride())
    shifted.copy_(x)
    leaf, residual = shifted.requires_grad_(), arguments["residual"].clone().requires_grad_()
    y = batch_norm_act(**(arguments | {"x": leaf, "residual": residual}), training=True, momentum=0.3, eps=1e-4,
                       activation="silu")  # fmt: skip
    y.backward(dy)
    torch.testing.assert_close(y, expected["y"])
    torch.testing.assert_close(leaf.grad, expected["dx"])
    torch.testing.assert_close(residual.grad, expected["dresidual"])


@by_layout
def test_a_batch_of_none_leaves_the_statistics_alone(kernels, layout):
    for training in (True, False):
        arguments, dy = tensors((0, 6, 4, 4), torch.float32, layout, full=6)
        ours = run(batch_norm_act, arguments, dy, training=training, activation="relu")
        assert ours["y"].shape == ours["dx"].shape == (0, 6, 4, 4)
        assert ours["dweight"].eq(0).all() and ours["dbias"].eq(0).all()
        assert torch.equal(ours["running_mean"], arguments["running_mean"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_not_hidden_by_the_activation(kernels, activation):
    for layout in LAYOUTS:
        arguments, _ = tensors((4, 20, 5, 4), torch.float32, layout, full=20)
        arguments["x"][0, 0, 0, 0] = torch.nan
        y = batch_norm_act(**arguments, training=False, activation=activation)
        assert y[0, 0, 0, 0].isnan() and y.isnan().sum() == 1


def test_extreme_values_stay_finite_in_silu(kernels):
    x = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4]).repeat(8, 1).requires_grad_()
    ones, zeros = torch.ones(7), torch.zeros(7)
    y = batch_norm_act(x, None, None, zeros, ones, training=False, eps=0.0, activation="silu")
    y.sum().backward()
    reference = x.detach().double().requires_grad_()
    F.silu(reference).sum().backward()
    torch.testing.assert_close(y.double(), F.silu(reference), rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(x.grad.double(), reference.grad, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("segments", [[], [0, 30, 40, 7]], ids=["prefix", "segments"])
@pytest.mark.parametrize("rows_per_chunk", [1, 10, 64, 1000])
def test_partial_sums_of_other_kernels_are_merged_as_the_reference_does(library, rows_per_chunk, segments):
    x = torch.randn(197, 37, dtype=torch.float64) + 1e4
    parts = x.split(rows_per_chunk)
    partials = torch.stack([torch.stack([p[0], (p - p[0]).sum(0), (p - p[0]).square().sum(0)]) for p in parts])
    vectors = [torch.rand(50) + 0.5 for _ in range(4)]
    mine, expected = [[v.clone() for v in vectors] for _ in range(2)]
    call = (len(x), rows_per_chunk), (0.3, 1e-4, segments)
    stats, coefficients = Emulated(library).finalize(partials.float(), *call[0], *mine, *call[1])
    truth = batch_norm_finalize_reference(partials.float(), *call[0], *expected, *call[1])
    torch.testing.assert_close(stats, truth[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(coefficients, truth[1], rtol=1e-6, atol=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(mine, expected, strict=True))


@pytest.mark.skipif(not resources.tool("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
@pytest.mark.parametrize("stem", ["statistics", "forward", "backward"])
def test_kernels_compile_within_the_chips_limits(stem, architecture):
    kernels = resources.cuda_resources(f"batch_norm_act_{stem}", architecture)
    assert {kernel.name: kernel.problems() for kernel in kernels if kernel.problems()} == {}
    for kernel in kernels:  # <type, elements of an access, ...>
        if "16, 8, " in kernel.name or "<float, 4, " in kernel.name:
            assert kernel.wide, kernel.name
            assert kernel.occupancy >= 0.25, kernel.name


GPU_SHAPES = [(4, 96, 112, 112), (4, 144, 56, 56), (8, 960, 7, 7), (4, 2048, 7, 7), (4, 65, 14, 14), (2, 24, 56, 56)]


def on_gpu(arguments: dict, dy: torch.Tensor) -> tuple[dict, torch.Tensor]:
    return {name: None if t is None else t.cuda() for name, t in arguments.items()}, dy.cuda()


@pytest.fixture(params=["cuda", "triton"])
def forced(request):
    """A GPU backend, forced; skipped where it cannot run, with the reason."""
    reason = backend.unusable(request.param, backend.target_of(torch.empty(0, device="cuda")))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with backend.use_backend(request.param):
        yield request.param


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@by_layout
@pytest.mark.parametrize("shape", [*SHAPES, *MORE_SHAPES, *GPU_SHAPES], ids=str)
def test_kernels_on_the_gpu_are_as_exact_as_torch(forced, dtype, layout, shape):
    for activation, residual in (("relu", False), ("none", True), ("relu6", True), ("silu", True)):
        for training in (True, False):
            arguments, dy = on_gpu(*tensors(shape, dtype, layout, residual=residual))
            check(arguments, dy, shape[1], training=training, activation=activation)


@pytest.mark.gpu
@by_layout
def test_large_means_and_repeats_on_the_gpu(forced, layout):
    arguments, dy = tensors((6, 40, 61, 67), torch.float32, layout)
    arguments["x"] = arguments["x"] / 2 + 1e4
    arguments, dy = on_gpu(arguments, dy)
    first, second = (run(batch_norm_act, arguments, dy) for _ in range(2))
    truth = run(batch_norm_act_reference, doubled(arguments), dy.double())
    for name, value in first.items():
        if value is not None:
            assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(second[name])), name
    for name in ("running_mean", "running_var", "y", "dweight"):
        active = slice(None) if name == "y" else slice(0, 40)
        value, exact = first[name][active].double(), truth[name][active]
        assert (value - exact).abs().max() <= 1e-5 * exact.abs().max(), name


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements_on_the_gpu(forced):
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    x = torch.ones(200, 96, 336, 336, dtype=torch.bfloat16, device="cuda").to(memory_format=torch.channels_last)
    x[-1] = 3
    y = batch_norm_act(x, None, None, None, None, training=True)
    mean, var = 1 + 2 / 200, 4 * (199 / 200**2)
    for image, value in ((0, 1.0), (-1, 3.0)):
        expected = torch.full_like(y[image], (value - mean) / (var + 1e-5) ** 0.5)
        torch.testing.assert_close(y[image], expected, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_partial_sums_are_merged_on_the_gpu_as_on_the_cpu():
    partials = torch.randn(40, 3, 72).abs()
    partials[:, 2] += partials[:, 1].square()
    vectors = [torch.rand(80) + 0.5 for _ in range(4)]
    device = [v.cuda() for v in vectors]
    call = (39 * 128 + 5, 128), (0.1, 1e-5, [2, 40, 45, 32])
    expected = batch_norm_finalize_reference(partials, *call[0], *vectors, *call[1])
    ours = torch.ops.fastslim.batch_norm_finalize(partials.cuda(), *call[0], *device, *call[1])
    for mine, exact in zip([*ours, *device], [*expected, *vectors], strict=True):
        torch.testing.assert_close(mine.cpu(), exact, rtol=1e-6, atol=1e-6)
