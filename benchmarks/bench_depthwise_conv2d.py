"""depthwise_conv2d on a CPU against the best of torch's own convolution (groups = C), each direction by itself.

The shapes are MobileNetV2's depthwise layers and odd widths of them. What is timed is what a step runs: our kernel or
the library, as the table in fastslim/ops/depthwise_conv2d_rule.py says, read off these numbers. Its rivals are
the other of the two, and torch in NCHW.
"""

import pytest
import torch

import fastslim  # noqa: F401  (defines the ops)
from fastslim.ops import backend

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
    *((channels, 3, 1, 28) for channels in (8, 24, 40, 72, 120, 200)),  # widths that fill no vector
    (8, 3, 1, 112),
    (24, 3, 1, 56),
    (72, 3, 1, 56),
    (40, 5, 2, 28),
    (120, 5, 1, 28),
    (200, 7, 1, 14),
]
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]
DIRECTIONS = ["forward", "backward_input", "backward_weight"]
BAR = 1 / 0.9  # of the time of the best


def kernel_of(direction, x, weight, grad, conv):
    """Our kernel for one direction."""
    ours = torch.ops.fastslim
    grad_weight = torch.zeros(weight.shape)

    def backward_weight():
        ours.depthwise_conv2d_backward_weight(grad, x, grad_weight, None, *conv, [], 1, False, False)
        return grad_weight

    return {
        "forward": lambda: ours.depthwise_conv2d(x, weight, None, *conv, [], 1),
        "backward_input": lambda: ours.depthwise_conv2d_backward_input(grad, weight, x.shape, True, *conv, [], 1),
        "backward_weight": backward_weight,
    }[direction]


def library_of(direction, x, weight, grad, conv):
    """Torch's convolution for one direction."""
    aten, rest = torch.ops.aten, (*conv, False, (0, 0), x.shape[1])
    if direction == "forward":
        return lambda: aten.convolution(x, weight, None, *rest)
    place = 0 if direction == "backward_input" else 1
    mask = (place == 0, place == 1, False)
    return lambda: aten.convolution_backward(grad, x, weight, None, *rest, mask)[place]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "pixels"), SHAPES, ids=[f"{c}ch-k{k}-s{s}-{p}px" for c, k, s, p in SHAPES]
)
def test_depthwise_conv2d(against, channels, kernel, stride, pixels, direction, dtype):
    torch.manual_seed(0)

    def pair(value):
        return value, value

    conv = (pair(stride), pair(kernel // 2), (1, 1))
    x = torch.randn(BATCH, channels, pixels, pixels).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(channels, 1, kernel, kernel).to(dtype)
    grad = torch.randn_like(torch.ops.aten.convolution(x, weight, None, *conv, False, (0, 0), channels))
    ours = kernel_of(direction, x, weight, grad, conv)
    library = library_of(direction, x, weight, grad, conv)
    expected = library().float()
    # Torch adds float32 weight gradients of 100 000 terms less exactly than we do.
    allowed = max(8 * torch.finfo(dtype).eps, 1e-4 if direction == "backward_weight" else 0)
    torch.testing.assert_close(ours().float(), expected, rtol=0, atol=allowed * expected.abs().max().item())
    call = direction, True, pair(kernel), pair(stride), (1, 1), 1, 1, channels, BATCH * pixels**2
    chosen = backend.choose("depthwise_conv2d", "cpu", dtype, *call).backend
    rivals = {
        "kernel": ours,
        "torch": library,
        "torch_nchw": library_of(direction, x.contiguous(), weight, grad.contiguous(), conv),
    }
    run = rivals.pop("kernel" if chosen == "cpp" else "torch")
    against(run, dict.fromkeys(rivals, BAR), **rivals)
