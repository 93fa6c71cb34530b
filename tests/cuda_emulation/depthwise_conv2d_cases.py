"""Operands of depthwise_conv2d for the tests of its CUDA kernels, and how the emulated launchers are called."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
import torch.nn.functional as F
from emulation import pointer

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
CLAMPS = {"none": (-torch.inf, torch.inf), "relu": (0.0, torch.inf), "relu6": (0.0, 6.0)}
Pair = tuple[int, int]


class Layer(NamedTuple):
    """One convolution of a layer with `full` channels."""

    batch: int
    segments: tuple[Pair, ...]  # (start, count)
    size: Pair
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    multiplier: int = 1
    full: int = 7


class Case:
    """Operands of one call in one dtype and layout, NaN wherever the kernels must not read."""

    def __init__(
        self,
        layer: Layer,
        dtype: torch.dtype,
        channels_last: bool,
        device: str = "cpu",
        activation: str | None = None,
    ) -> None:
        torch.manual_seed(0)
        m, full = layer.multiplier, layer.full
        self.layer, self.channels_last, self.activation = layer, channels_last, activation
        self.rows = [row for start, count in layer.segments for row in range(start * m, (start + count) * m)]
        channels = len(self.rows) // m
        self.x = self._image(torch.randn(layer.batch, channels, *layer.size, device=device).to(dtype))
        self.weight = torch.full((full * m, 1, *layer.kernel), torch.nan, dtype=dtype, device=device)
        self.bias = torch.full((full * m,), torch.nan, dtype=dtype, device=device)
        self.weight[self.rows] = torch.randn(len(self.rows), 1, *layer.kernel, device=device).to(dtype)
        self.bias[self.rows] = torch.randn(len(self.rows), device=device).to(dtype)
        self.prologue = torch.stack([torch.randn(channels), 0.5 + torch.rand(channels), torch.randn(channels)]).to(
            device
        )
        self.grad_y = self._image(torch.randn_like(self.library(dtype)[0]))
        self.before = torch.randn(full * m, 1, *layer.kernel, device=device)  # gradients of earlier passes
        self.bias_before = torch.randn(full * m, device=device)

    def _image(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def library(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Torch's own y, gradient of the convolution's input, grad_weight, grad_bias (active rows) in `dtype`."""
        x, weight, bias = (t.to(dtype) for t in (self.x, self.weight[self.rows], self.bias[self.rows]))
        if self.activation is not None:
            center, scale, shift = self.prologue.to(dtype)[:, :, None, None]
            x = ((x - center) * scale + shift).clamp(*CLAMPS[self.activation])
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = F.conv2d(*inputs, self.layer.stride, self.layer.padding, self.layer.dilation, groups=self.x.shape[1])
        grad_y = self.grad_y.to(dtype) if hasattr(self, "grad_y") else torch.zeros_like(y)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad_y)]

    def numbers(self) -> ctypes.Array:
        """The integers of DepthwiseConv2dCuda, in order."""
        x, w, layer = self.x, self.weight, self.layer
        numbers = [x.shape[0], x.shape[1], layer.multiplier, *x.shape[2:], *self.grad_y.shape[2:], *w.shape[2:]]
        numbers += [*layer.stride, *layer.padding, *layer.dilation, self.channels_last, *x.stride()]
        numbers += [*self.grad_y.stride(), w.stride(0), w.stride(2), w.stride(3), self.bias.stride(0), x.shape[1]]
        numbers += [len(layer.segments), *(number for segment in layer.segments for number in segment)]
        return (ctypes.c_int64 * len(numbers))(*numbers)

    def check(self, results: list[torch.Tensor]) -> None:
        """No result (y, grad_x, gradients of weight and bias with earlier passes') may be twice as wrong as torch's."""
        y, grad_x, grad_weight, grad_bias = (result.double() for result in results)
        before, bias_before = self.before.double(), self.bias_before.double()
        others = [row for row in range(len(before)) if row not in self.rows]
        assert torch.equal(grad_weight[others], before[others])
        assert torch.equal(grad_bias[others], bias_before[others])
        ours = [y, grad_x, grad_weight[self.rows] - before[self.rows], grad_bias[self.rows] - bias_before[self.rows]]
        tiny = 1e-12 if self.x.dtype == torch.float64 else 1e-5
        for mine, exact, torchs in zip(ours, self.library(torch.float64), self.library(self.x.dtype), strict=True):
            error, allowed = (mine - exact).abs(), (torchs.double() - exact).abs()
            assert mine.shape == exact.shape
            if mine.numel():
                assert error.max() <= 2 * allowed.max() + tiny * (1 + exact.abs().max())


def run_emulated(library: ctypes.CDLL, case: Case, width: int | None = None, most: int = 0) -> list[torch.Tensor]:
    """y, grad_x, grad_weight, grad_bias and, with an activation, the partial statistics.

    Results start as NaN, gradients as earlier passes' sums. With `width`, the kernels read it from memory and
    the launchers know only that it is at most `most`.
    """
    dtype, fused = case.x.dtype, case.activation is not None
    gradient_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    y, grad_x = torch.full_like(case.grad_y, torch.nan), torch.full_like(case.x, torch.nan)
    grad_weight = case.before.to(gradient_dtype, copy=True)
    grad_bias = case.bias_before.to(gradient_dtype, copy=True)
    numbers = case.numbers()
    device_width = None if width is None else torch.tensor([width], dtype=torch.int32)
    if width is not None:
        numbers[1] = most
    workspace = torch.full((library.workspace_floats(numbers, pointer(device_width)),), torch.nan)
    partials = torch.full((library.statistics_chunks(numbers), 3, case.x.shape[1]), torch.nan)
    low, high = (ctypes.c_float(value) for value in CLAMPS[case.activation or "none"])
    prologue = pointer(case.prologue if fused else None)

    def call(what: bytes, *tensors: torch.Tensor | None) -> None:
        failed = library.run_kernel(
            DTYPES[dtype], what, *map(pointer, tensors), pointer(workspace), numbers, pointer(device_width),
            fused, prologue, low, high, pointer(partials if fused else None),
        )  # fmt: skip
        assert not failed

    call(b"forward", case.x, case.weight, y, case.bias)
    call(b"backward_input", case.grad_y, case.weight, grad_x, None)
    call(b"backward_weight", case.grad_y, case.x, grad_weight, grad_bias)
    return [y, grad_x, grad_weight, grad_bias, *([partials] if fused else [])]
