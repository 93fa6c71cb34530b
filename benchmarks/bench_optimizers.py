"""torch's fused optimizers against its loops, on gradients in one flat buffer, and against the bytes they must move.

The floor is a copy that moves as many bytes: 5 words a parameter for SGD with momentum (parameter, gradient and
momentum read, two of them written), 7 for Adam.
"""

from __future__ import annotations

import pytest
import torch

from fastslim import models
from fastslim.bench import FORMATS
from fastslim.ops.step_buffers import StepBuffers

OPTIMIZERS = {  # and words a parameter
    "sgd": (lambda parameters, fused: torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, fused=fused), 5),
    "adam": (lambda parameters, fused: torch.optim.Adam(parameters, lr=1e-4, fused=fused), 7),
    "adamw": (lambda parameters, fused: torch.optim.AdamW(parameters, lr=1e-4, fused=fused), 7),
}


def optimizer_of(name, network, memory_format, fused):
    torch.manual_seed(0)
    parameters = list(models.create_model(network).to(memory_format=memory_format).parameters())
    buffers = StepBuffers(parameters)
    buffers.begin()
    for p in parameters:
        buffers.slot(p).target(region_full=True)[0].normal_()
    buffers.finish()
    return OPTIMIZERS[name][0](parameters, fused), parameters


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("network", ["resnet50", "resnet18", "mobilenet_v2"])
def test_fused_optimizer(against, network, memory_format, name):
    (fused, ours), (loop, theirs) = (
        optimizer_of(name, network, FORMATS[memory_format], fused) for fused in (True, False)
    )
    for _ in range(2):
        fused.step(), loop.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)  # no speed of a wrong result
    source = torch.zeros(sum(p.numel() for p in ours) * OPTIMIZERS[name][1] // 2)
    target = torch.empty_like(source)
    against(fused.step, loop=loop.step, floor=lambda: target.copy_(source))
