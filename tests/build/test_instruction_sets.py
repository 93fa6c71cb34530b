"""Every instruction set this CPU has gives the same results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastslim

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")

# Every op forward and backward on one small case, as lists that survive JSON.
EVERY_OP = """
import json, torch
from fastslim import _ext, ops
torch.manual_seed(0)
x = torch.randn(3, 13, 9, 7, requires_grad=True)
weight, bias = torch.randn(16, 1, 3, 3, requires_grad=True), torch.randn(16, requires_grad=True)
y = ops.depthwise_conv2d(x, weight, bias, stride=1, padding=1, dilation=1)
gamma, beta, mean, var = torch.rand(16), torch.randn(16), torch.zeros(16), torch.ones(16)
y = ops.batch_norm_act(y, gamma, beta, mean, var, training=True, momentum=0.1, eps=1e-5, activation="silu")
logits = y.flatten(1)[:, :101]
teacher = torch.randn(3, 101, requires_grad=True)
losses = ops.sandwich_loss(teacher, [logits], torch.tensor([0, 5, 100]), tau=2.0)
losses.sum().backward()
values = [losses, x.grad, weight.grad, bias.grad, teacher.grad, mean, var]
print(json.dumps([_ext.BUILD["cpu_isa"], [v.detach().double().flatten().tolist() for v in values]]))
"""


def run_python(code: str, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(Path(fastslim.__file__).parents[1]), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def results():
    """What every op gives under each instruction set this CPU has."""
    found = {}
    for isa in ISAS:
        used, values = json.loads(run_python(EVERY_OP, FASTSLIM_CPU_ISA=isa, OMP_NUM_THREADS="1"))
        found[used] = values
    return found


def test_every_instruction_set_below_the_best_can_be_forced(results):
    best = run_python("from fastslim import _ext; print(_ext.BUILD['cpu_isa'])").strip()
    assert list(results) == list(ISAS[: ISAS.index(best) + 1])


def test_every_instruction_set_gives_the_same_results(results):
    for isa, values in results.items():
        for value, expected in zip(values, results["baseline"], strict=True):
            assert value == pytest.approx(expected, rel=1e-5, abs=1e-5), isa
