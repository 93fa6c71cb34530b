"""slim_conv2d in a step against `F.conv2d` on a slice with ordinary autograd: forward, backward, gradient added up.

Widths are 3/4 of each layer, in channels_last; shapes are ResNet-50's and MobileNetV2's at half their usual size.
"""

import pytest
import torch
import torch.nn.functional as F

from fastslim.ops import slim_conv2d
from fastslim.ops.step_buffers import StepBuffers

SHAPES = {  # C_in -> C_out, kernel, stride, pixels
    "3x3-64-64-28px": (64, 64, 3, 1, 28),
    "3x3-128-128-s2-28px": (128, 128, 3, 2, 28),
    "3x3-512-512-4px": (512, 512, 3, 1, 4),
    "1x1-256-64-28px": (256, 64, 1, 1, 28),
    "1x1-512-2048-4px": (512, 2048, 1, 1, 4),
    "1x1-96-24-28px": (96, 24, 1, 1, 28),
    "1x1-24-144-28px": (24, 144, 1, 1, 28),
}
BATCH = 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_slim_conv2d(against, shape, dtype) -> None:
    full_in, full_out, kernel, stride, pixels = shape
    c_in, c_out, padding = full_in * 3 // 4, full_out * 3 // 4, kernel // 2
    x = torch.randn(BATCH, c_in, pixels, pixels).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(full_out, full_in, kernel, kernel).to(memory_format=torch.channels_last)
    ours, plain = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    buffers = StepBuffers([ours])
    buffers.begin()
    with buffers.active():
        upstream = torch.randn_like(slim_conv2d(x, ours.to(dtype), stride=stride, padding=padding, c_out=c_out))

    def fast_step():
        x.grad = None
        with buffers.active(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = slim_conv2d(x, ours, stride=stride, padding=padding, c_out=c_out)
        y.backward(upstream)

    def sliced():
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = F.conv2d(x, plain[:c_out, :c_in], None, stride, padding)
        y.backward(upstream)

    fast_step()
    sliced()
    torch.testing.assert_close(
        buffers.slot(ours).view, plain.grad, rtol=2e-2, atol=2e-2 * float(plain.grad.abs().max())
    )
    against(fast_step, sliced_torch=sliced)
