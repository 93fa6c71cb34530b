"""The CUDA kernels of depthwise_conv2d: run on the CPU always, compiled where nvcc is, run on a GPU if there is one."""

from __future__ import annotations

import ctypes

import pytest
import resources
import torch
import torch.nn.functional as F
from emulation import emulated, pointer

# batch, segments (start, count) of an 7-channel layer, multiplier, size, kernel, stride, padding, dilation
CASES = {
    "3x3": (2, [(0, 7)], 1, (6, 5), (3, 3), (1, 1), (1, 1), (1, 1)),
    "prefix_stride2": (3, [(0, 5)], 1, (9, 7), (3, 3), (2, 2), (1, 1), (1, 1)),
    "5x5_uneven": (1, [(0, 1)], 2, (8, 7), (5, 3), (2, 1), (2, 0), (1, 2)),
    "segments": (2, [(0, 2), (4, 3)], 2, (5, 5), (3, 3), (1, 1), (0, 1), (1, 1)),
    "many_pixels": (5, [(0, 2)], 1, (17, 13), (3, 3), (1, 1), (1, 1), (1, 1)),
    "batch_0": (0, [(0, 4)], 1, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1)),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
CHANNELS_FULL = 7


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated("depthwise_conv2d", tmp_path_factory.mktemp("emulation"))


class Case:
    """Operands of one call in one dtype and layout, NaN wherever the kernels must not read."""

    def __init__(self, name: str, dtype: torch.dtype, channels_last: bool, device: str = "cpu") -> None:
        batch, self.segments, m, size, kernel, self.stride, self.padding, self.dilation = CASES[name]
        torch.manual_seed(0)
        self.channels_last, self.multiplier = channels_last, m
        self.rows = [row for start, count in self.segments for row in range(start * m, (start + count) * m)]
        channels = len(self.rows) // m
        self.x = self._image(torch.randn(batch, channels, *size, device=device).to(dtype))
        self.weight = torch.full((CHANNELS_FULL * m, 1, *kernel), torch.nan, dtype=dtype, device=device)
        self.bias = torch.full((CHANNELS_FULL * m,), torch.nan, dtype=dtype, device=device)
        self.weight[self.rows] = torch.randn(len(self.rows), 1, *kernel, device=device).to(dtype)
        self.bias[self.rows] = torch.randn(len(self.rows), device=device).to(dtype)
        self.grad_y = self._image(torch.randn_like(self.library(dtype)[0]))
        self.before = torch.randn(CHANNELS_FULL * m, 1, *kernel, device=device)  # gradients of earlier passes
        self.bias_before = torch.randn(CHANNELS_FULL * m, device=device)

    def _image(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def library(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Torch's own y, grad_x, grad_weight, grad_bias (active rows) in `dtype`."""
        inputs = [t.to(dtype).detach().requires_grad_() for t in (self.x, self.weight[self.rows], self.bias[self.rows])]
        y = F.conv2d(*inputs, self.stride, self.padding, self.dilation, groups=self.x.shape[1])
        grad_y = self.grad_y.to(dtype) if hasattr(self, "grad_y") else torch.zeros_like(y)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad_y)]

    def numbers(self, y: torch.Tensor) -> ctypes.Array:
        """The integers of DepthwiseConv2dCuda, in order."""
        x, w = self.x, self.weight
        numbers = [x.shape[0], x.shape[1], self.multiplier, *x.shape[2:], *y.shape[2:], *w.shape[2:]]
        numbers += [*self.stride, *self.padding, *self.dilation, self.channels_last, *x.stride(), *y.stride()]
        numbers += [w.stride(0), w.stride(2), w.stride(3), self.bias.stride(0), len(self.segments)]
        numbers += [number for segment in self.segments for number in segment]
        return (ctypes.c_int64 * len(numbers))(*numbers)


def run_emulated(library: ctypes.CDLL, case: Case) -> list[torch.Tensor]:
    """y, grad_x, grad_weight, grad_bias of the kernels; results start as NaN, gradients as earlier passes' sums."""
    dtype = case.x.dtype
    run = getattr(library, f"run_{str(dtype).removeprefix('torch.')}")
    gradient_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    y, grad_x = torch.full_like(case.grad_y, torch.nan), torch.full_like(case.x, torch.nan)
    grad_weight = case.before.to(gradient_dtype, copy=True)
    grad_bias = case.bias_before.to(gradient_dtype, copy=True)
    numbers = case.numbers(y)

    def call(what: bytes, *tensors: torch.Tensor | None) -> None:
        run(what, *map(pointer, tensors), numbers)

    call(b"forward", case.x, case.weight, y, case.bias)
    call(b"backward_input", case.grad_y, case.weight, grad_x, None)
    call(b"backward_weight", case.grad_y, case.x, grad_weight, grad_bias)
    return [y, grad_x, grad_weight, grad_bias]


def check(case: Case, results: list[torch.Tensor]) -> None:
    """No result may be more than twice as wrong as torch's own in the same dtype."""
    y, grad_x, grad_weight, grad_bias = (result.double() for result in results)
    before, bias_before = case.before.double(), case.bias_before.double()
    others = [row for row in range(len(before)) if row not in case.rows]
    assert torch.equal(grad_weight[others], before[others])
    assert torch.equal(grad_bias[others], bias_before[others])
    ours = [y, grad_x, grad_weight[case.rows] - before[case.rows], grad_bias[case.rows] - bias_before[case.rows]]
    tiny = 1e-12 if case.x.dtype == torch.float64 else 1e-5
    for mine, exact, torchs in zip(ours, case.library(torch.float64), case.library(case.x.dtype), strict=True):
        error, allowed = (mine - exact).abs(), (torchs.double() - exact).abs()
        assert mine.shape == exact.shape
        if mine.numel():
            assert error.max() <= 2 * allowed.max() + tiny * (1 + exact.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", CASES)
def test_kernels_run_by_the_host_agree_with_torch(library, name, channels_last, dtype):
    case = Case(name, dtype, channels_last)
    check(case, run_emulated(library, case))


def test_repeats_are_bitwise_equal(library):
    case = Case("many_pixels", torch.float32, True)
    first, second = run_emulated(library, case), run_emulated(library, case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(not resources.tool("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_kernels_compile_within_the_chips_limits(architecture):
    kernels = resources.cuda_resources("depthwise_conv2d", architecture)
    assert {kernel.name: kernel.problems() for kernel in kernels if kernel.problems()} == {}
    assert len(kernels) == 12  # three kernels in four dtypes
    assert max(kernel.registers for kernel in kernels) <= 96  # two blocks of 256 threads and more stay resident


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", CASES)
def test_kernels_on_the_gpu_agree_with_torch(name, channels_last, dtype):
    import fastslim  # noqa: F401  (registers the ops)

    case = Case(name, dtype, channels_last, device="cuda")
    ops = torch.ops.fastslim
    segments = [number for segment in case.segments for number in segment]
    conv = (case.stride, case.padding, case.dilation, segments, case.multiplier)
    gradient_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    grad_weight = case.before.to(gradient_dtype, copy=True)
    grad_bias = case.bias_before.to(gradient_dtype, copy=True)
    y = ops.depthwise_conv2d(case.x, case.weight, case.bias, *conv)
    grad_x = ops.depthwise_conv2d_backward_input(case.grad_y, case.weight, case.x.shape, channels_last, *conv)
    ops.depthwise_conv2d_backward_weight(case.grad_y, case.x, grad_weight, grad_bias, *conv, True, True)
    check(case, [y, grad_x, grad_weight, grad_bias])
