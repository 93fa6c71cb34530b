"""The convolution's C++ kernels add the input's gradient to what is there."""

import pytest
import torch

from fastslim._ext import BUILD

OPS = torch.ops.fastslim
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16, marks=pytest.mark.skipif(not BUILD["slim_conv2d_bf16"], reason="bfloat16 needs a CPU with AMX")
    ),
]
# c_in, c_out, kernel, stride, padding, pixels: lines of whole and of cut tiles, products, classes without taps
SHAPES = [
    (24, 40, 1, 1, 0, 7),
    (33, 17, 1, 1, 0, 5),
    (16, 24, 3, 1, 1, 20),
    (40, 16, 3, 1, 1, 6),
    (24, 24, 3, 2, 1, 21),
    (16, 32, 1, 2, 0, 9),
    (8, 8, 2, 3, 0, 10),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_is_added(shape, dtype):
    c_in, c_out, kernel, stride, padding, pixels = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(c_out + 3, c_in + 5, kernel, kernel, generator=generator).to(memory_format=torch.channels_last)
    conv = [stride] * 2, [padding] * 2, [1, 1], c_out, []
    x = torch.empty(2, c_in, pixels, pixels, dtype=dtype).to(memory_format=torch.channels_last)
    size = (pixels + 2 * padding - kernel) // stride + 1
    grad = torch.randn(2, c_out, size, size, generator=generator).to(dtype).to(memory_format=torch.channels_last)
    held = torch.randn(x.shape, generator=generator).to(dtype).to(memory_format=torch.channels_last)
    alone = OPS.slim_conv2d_backward_input_cpp(grad, weight, x.shape, *conv)
    total = held.clone()
    OPS.slim_conv2d_backward_input_add_cpp(grad, weight, total, *conv)
    # Added before it is rounded, so nothing is rounded twice.
    rounded = 2.0 ** (-7 if dtype == torch.bfloat16 else -20)
    torch.testing.assert_close(total.double(), held.double() + alone.double(), rtol=rounded, atol=rounded)


def test_what_is_added_to_must_lie_as_the_kernels_write():
    grad, weight = torch.ones(1, 4, 3, 3), torch.ones(4, 8, 1, 1)
    conv = [1, 1], [0, 0], [1, 1], 4, []
    for held in (torch.zeros(1, 8, 3, 3), torch.zeros(1, 8, 3, 3, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="grad_x must be in channels_last"):
            OPS.slim_conv2d_backward_input_add_cpp(grad, weight, held, *conv)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("c_in", "columns"), [(15, 80), (3, 400)])
def test_kernels_wider_than_usual(c_in, columns, dtype):
    x = torch.randn(1, c_in, 1, columns + 9).to(dtype).to(memory_format=torch.channels_last)
    grad = torch.randn(1, 8, 1, 10).to(dtype).to(memory_format=torch.channels_last)
    mine = torch.zeros(8, c_in, 1, columns)
    OPS.slim_conv2d_backward_weight_cpp(grad, x, mine, [1, 1], [0, 0], [1, 1], 8, [], False)
    exact = torch.nn.grad.conv2d_weight(x.double(), mine.shape, grad.double())
    torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4)


def test_the_last_channels_of_wider_pixels_are_not_read_past():
    # 128 channels behind 16 others: pixels as far apart as the kernel's own copy of them.
    wide = torch.randn(1, 144, 6, 6).to(memory_format=torch.channels_last)
    x, grad = wide[:, 16:], torch.randn(1, 8, 6, 6).to(memory_format=torch.channels_last)
    mine = torch.zeros(8, 128, 3, 3).to(memory_format=torch.channels_last)
    OPS.slim_conv2d_backward_weight_cpp(grad, x, mine, [1, 1], [1, 1], [1, 1], 8, [], False)
    exact = torch.nn.grad.conv2d_weight(x.double(), mine.shape, grad.double(), padding=1)
    torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4)
