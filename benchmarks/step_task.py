"""What the benchmarks of whole steps train."""

from __future__ import annotations

import copy

import torch

import fastslim
from fastslim import models
from fastslim.bench import Task

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def make_task(name, dtype, batch, pixels):
    """The network, and the supernet of it, whose step is known to be exact."""
    torch.manual_seed(0)
    model = without_dropout(models.create_model(name))
    images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(0, 1000, (batch,))
    algo = fastslim.AutoSlim(architecture=copy.deepcopy(model), example_inputs=images[:1], seed=0)
    task = Task(model, algo, images, labels, DTYPES[dtype])
    with task.precision():
        report = fastslim.verify(algo, (images[:4, :, :64, :64], labels[:4]))
    assert report, f"no speed of a wrong step:\n{report}"
    return task
