"""sandwich_loss, forward and backward, against F.cross_entropy + F.kl_div and against the bytes it must move.

The floor is one read of every logit and one write of its gradient, measured as a copy of the same size.
"""

import statistics
import time

import pytest
import torch
from torch.nn import functional as F

from fastslim.ops import sandwich_loss

STUDENTS = 3
PAIRS = 30
SHAPES = [
    pytest.param(16, 10, id="digits"),
    pytest.param(64, 1000, id="imagenet-n64"),
    pytest.param(256, 1000, id="imagenet-n256"),
    pytest.param(4, 200_000, id="200k-classes"),
]
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]


def eager(teacher, students, target):
    """The same losses as a user writes them with torch."""
    soft = F.softmax(teacher.detach(), dim=1)
    losses = [F.kl_div(F.log_softmax(student, dim=1), soft, reduction="batchmean") for student in students]
    return torch.stack([F.cross_entropy(teacher, target), *losses])


def seconds(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def median_ratio(slow, fast):
    """Median of slow / fast over interleaved pairs."""
    return statistics.median(seconds(slow) / seconds(fast) for _ in range(PAIRS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "c"), SHAPES)
def test_sandwich_loss_forward_backward(benchmark, n, c, dtype):
    logits = [torch.randn(n, c).mul(3).to(dtype).requires_grad_() for _ in range(1 + STUDENTS)]
    target = torch.randint(c, (n,))

    def step(function):
        losses = function(logits[0], logits[1:], target)
        return losses, torch.autograd.grad(losses.sum(), logits)

    for ours, theirs in zip(*(step(f)[1] for f in (sandwich_loss, eager)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-4)  # no speed of a wrong result
    source = torch.stack([x.detach() for x in logits])
    gradient = torch.empty_like(source)

    benchmark.pedantic(step, args=(sandwich_loss,), rounds=PAIRS, warmup_rounds=3)
    benchmark.extra_info["eager / ours"] = round(median_ratio(lambda: step(eager), lambda: step(sandwich_loss)), 2)
    benchmark.extra_info["ours / copy"] = round(
        median_ratio(lambda: step(sandwich_loss), lambda: gradient.copy_(source)), 2
    )
    print(f"\n{benchmark.name}: {benchmark.extra_info}")
