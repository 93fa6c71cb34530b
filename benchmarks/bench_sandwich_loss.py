"""sandwich_loss, forward and backward, against F.cross_entropy + F.kl_div and against the bytes it must move.

The floor is one read of every logit and one write of its gradient, measured as a copy of the same size in turns with
the op. Where that takes microseconds, `nothing` shows what any op with a gradient costs in torch: the same call chain
(an autograd.Function, a sum, autograd.grad), but with nothing to compute.
"""

import pytest
import torch
from torch.nn import functional as F

from fastslim.ops import sandwich_loss

STUDENTS = 3
SHAPES = [
    pytest.param(16, 10, id="digits"),
    pytest.param(64, 1000, id="imagenet-n64"),
    pytest.param(256, 1000, id="imagenet-n256"),
    pytest.param(4, 200_000, id="200k-classes"),
]
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]
BARS = {"floor": 1.5}


def eager(teacher, students, target):
    """The same losses as a user writes them with torch."""
    soft = F.softmax(teacher.detach(), dim=1)
    losses = [F.kl_div(F.log_softmax(student, dim=1), soft, reduction="batchmean") for student in students]
    return torch.stack([F.cross_entropy(teacher, target), *losses])


class Nothing(torch.autograd.Function):
    """Losses and gradients that are there already."""

    @staticmethod
    def forward(ctx, losses, gradients, *logits):
        ctx.gradients = gradients
        return losses.view_as(losses)

    @staticmethod
    def backward(ctx, grad):
        return None, None, *ctx.gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "c"), SHAPES)
def test_sandwich_loss_forward_backward(against, n, c, dtype):
    logits = [torch.randn(n, c).mul(3).to(dtype).requires_grad_() for _ in range(1 + STUDENTS)]
    target = torch.randint(c, (n,))

    def step(function):
        losses = function(logits[0], logits[1:], target)
        return losses, torch.autograd.grad(losses.sum(), logits)

    for ours, theirs in zip(*(step(f)[1] for f in (sandwich_loss, eager)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-4)  # no speed of a wrong result
    source = torch.stack([x.detach() for x in logits])
    gradient = torch.empty_like(source)
    losses, gradients = torch.zeros(1 + STUDENTS), list(gradient.unbind())
    against(
        lambda: step(sandwich_loss),
        BARS,
        eager=lambda: step(eager),
        floor=lambda: gradient.copy_(source),
        nothing=lambda: step(lambda teacher, students, _: Nothing.apply(losses, gradients, teacher, *students)),
    )
