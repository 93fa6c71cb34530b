"""slim_linear in a step against `F.linear` on a slice with ordinary autograd: forward, backward, gradient added up."""

import pytest
import torch
import torch.nn.functional as F

from fastslim.ops import slim_linear
from fastslim.ops.step_buffers import StepBuffers

SHAPES = {"64-2048-1000": (64, 2048, 1000), "16-1280-1000": (16, 1280, 1000), "1568-384-1536": (1568, 384, 1536)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_slim_linear(against, shape, dtype) -> None:
    rows, full_in, full_out = shape
    c_in, c_out = full_in * 3 // 4, full_out * 3 // 4
    x = torch.randn(rows, c_in).to(dtype).requires_grad_()
    weight, upstream = torch.randn(full_out, full_in), torch.randn(rows, c_out).to(dtype)
    ours, plain = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    buffers = StepBuffers([ours])
    buffers.begin()

    def fast_step():
        x.grad = None
        with buffers.active(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = slim_linear(x, ours, c_out=c_out)
        y.backward(upstream)

    def sliced():
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = F.linear(x, plain[:c_out, :c_in])
        y.backward(upstream)

    fast_step()
    sliced()
    torch.testing.assert_close(
        buffers.slot(ours).view, plain.grad, rtol=2e-2, atol=2e-2 * float(plain.grad.abs().max())
    )
    against(fast_step, sliced_torch=sliced)
