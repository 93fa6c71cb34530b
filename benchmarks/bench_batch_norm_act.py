"""batch_norm_act in training, forward and backward, against F.batch_norm + add + F.relu and the bytes it must move.

The floor is counted in tensors of the activation's size that are read or written. channels_last, where a tensor does
not fit the cache between two passes over it: forward reads x for the statistics, reads x again (and the residual) and
writes y; backward reads dy, y and x for the sums, reads them again and writes dx (and the residual's gradient): 10
tensors, 12 with a residual. In NCHW a channel stays in the cache between the two passes, so that each tensor is read
once: 6 and 8. A copy moves two, so the floor is measured as that many copies of an activation, in turns with the op; an
activation that fits the cache is compared with copies that do.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastslim.ops import batch_norm_act
from fastslim.ops.batch_norm_act import ACTIVATIONS

SHAPES = [
    (16, 64, 56, 56),
    (8, 256, 56, 56),
    (16, 512, 7, 7),
    (16, 24, 56, 56),
    (16, 144, 28, 28),
    *((16, channels, 28, 28) for channels in (8, 24, 40, 72, 120, 200)),  # widths that fill no vector
]
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
TENSORS = {"nchw": 6, "nhwc": 10}
BARS = {"floor": 1.3}
OPS, RELU = torch.ops.fastslim, ACTIVATIONS.index("relu")


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_act_forward_backward(against, shape, layout, dtype, residual):
    channels = shape[1]
    x, skip, dy = (torch.randn(shape).to(dtype).contiguous(memory_format=FORMATS[layout]) for _ in range(3))
    weight, bias = torch.ones(channels), torch.zeros(channels)
    running = torch.zeros(channels), torch.ones(channels)
    leaves = [t.requires_grad_() for t in ((x, weight, bias, skip) if residual else (x, weight, bias))]
    add = skip if residual else None

    def ours():
        y = batch_norm_act(x, weight, bias, *running, training=True, activation="relu", residual=add)
        return torch.autograd.grad(y, leaves, dy)

    def eager():
        y = F.batch_norm(x, *running, weight, bias, True)
        return torch.autograd.grad(F.relu(y if add is None else y + add), leaves, dy)

    exact = [t.detach().double().requires_grad_() for t in leaves]
    y = F.batch_norm(exact[0], None, None, exact[1], exact[2], True)
    truth = torch.autograd.grad(F.relu(y + exact[3] if residual else y), exact, dy.double())
    for mine, theirs, true in zip(ours(), eager(), truth, strict=True):  # no speed of a wrong result
        # Rounding may move a value across zero, where the gradient jumps: the mean is what is compared.
        errors = [(value.double() - true).abs().mean() / true.abs().mean() for value in (mine, theirs)]
        assert errors[0] < 2 * errors[1] + 1e-5
    copies = (TENSORS[layout] + 2 * residual) // 2
    sources = [torch.empty_like(x, requires_grad=False).copy_(x.detach()) for _ in range(copies)]
    targets = [torch.empty_like(source) for source in sources]

    def floor():
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    values = [None if t is None else t.detach() for t in (x, weight, bias, add)]

    def kernel():
        y, stats = OPS.batch_norm_act(*values[:3], *running, values[3], True, 0.1, 1e-5, RELU, [])
        extra = y if residual else None
        OPS.batch_norm_act_backward(dy, values[0], extra, stats, *values[1:3], True, RELU, residual, True, [])

    against(ours, BARS, kernel, eager=eager, floor=floor)
