"""depthwise_conv2d's CPU kernels against torch's own convolution (groups = C), each direction by itself.

The shapes are MobileNetV2's depthwise layers and odd widths of them, channels_last. The backend table
in fastslim/ops/depthwise_conv2d.py was read off these numbers.
"""

import pytest
import torch

import fastslim  # noqa: F401  (defines the ops)

BATCH = 8
SHAPES = [  # channels, kernel, stride, pixels
    (32, 3, 1, 112),
    (96, 3, 2, 112),
    (144, 3, 1, 56),
    (144, 3, 2, 56),
    (192, 3, 2, 28),
    (384, 3, 1, 14),
    (576, 3, 2, 14),
    (960, 3, 1, 7),
    (8, 3, 1, 112),
    (24, 3, 1, 56),
    (72, 3, 1, 56),
    (40, 5, 2, 28),
    (120, 5, 1, 28),
    (200, 7, 1, 14),
]
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]
DIRECTIONS = ["forward", "backward_input", "backward_weight"]


def pair(direction, dtype, channels, kernel, stride, pixels):
    """Ours and torch's function for one direction; both return the result."""
    ours, aten = torch.ops.fastslim, torch.ops.aten
    padding = kernel // 2
    x = torch.randn(BATCH, channels, pixels, pixels).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(channels, 1, kernel, kernel).to(dtype)
    conv = ((stride, stride), (padding, padding), (1, 1))
    grad = torch.randn_like(aten.convolution(x, weight, None, *conv, False, (0, 0), channels))
    grad_weight = torch.zeros(weight.shape)

    def weight_gradient():
        ours.depthwise_conv2d_backward_weight(grad, x, grad_weight, None, *conv, [], 1, False, False)
        return grad_weight

    def library_backward(i):
        mask = (i == 0, i == 1, False)
        return aten.convolution_backward(grad, x, weight, None, *conv, False, (0, 0), channels, mask)[i]

    return {
        "forward": (
            lambda: ours.depthwise_conv2d(x, weight, None, *conv, [], 1),
            lambda: aten.convolution(x, weight, None, *conv, False, (0, 0), channels),
        ),
        "backward_input": (
            lambda: ours.depthwise_conv2d_backward_input(grad, weight, x.shape, True, *conv, [], 1),
            lambda: library_backward(0),
        ),
        "backward_weight": (weight_gradient, lambda: library_backward(1)),
    }[direction]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "pixels"), SHAPES, ids=[f"{c}ch-k{k}-s{s}-{p}px" for c, k, s, p in SHAPES]
)
def test_depthwise_conv2d(against, channels, kernel, stride, pixels, direction, dtype):
    torch.manual_seed(0)
    ours, theirs = pair(direction, dtype, channels, kernel, stride, pixels)
    expected = theirs().float()
    # Torch adds float32 weight gradients of 100 000 terms less exactly than we do.
    allowed = max(8 * torch.finfo(dtype).eps, 1e-4 if direction == "backward_weight" else 0)
    torch.testing.assert_close(ours().float(), expected, rtol=0, atol=allowed * expected.abs().max().item())
    against(ours, torch=theirs)
