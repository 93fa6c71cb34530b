"""Logits, options and the error rule that the tests of sandwich_loss share, on the CPU and for a GPU."""

from __future__ import annotations

import torch
from torch.nn import functional as F

OPTIONS = {
    "plain": {},
    "tau": {"tau": 4.0},
    "smoothing": {"label_smoothing": 0.1},
    "weight": {"class_weight": True},
    "smoothing-weight-tau": {"label_smoothing": 0.3, "class_weight": True, "tau": 0.5},
    "ignore": {"ignore_index": 1},
}


def batch(n, c, *positions, dtype=torch.float32, students=2, seed=0, scale=3.0):
    """Teacher, students and targets of one shape."""
    random = torch.Generator().manual_seed(seed)
    logits = [torch.randn(n, c, *positions, generator=random) * scale for _ in range(1 + students)]
    target = torch.randint(0, c, (n, *positions), generator=random)
    return [x.to(dtype) for x in logits], target


def with_weight(options, classes):
    if not options.get("class_weight"):
        return options
    return options | {"class_weight": torch.linspace(0.2, 2.0, classes, dtype=torch.float64)}


def losses_and_grads(function, logits, *args, **kwargs):
    leaves = [x.detach().clone().requires_grad_() for x in logits]
    losses = function(leaves[0], leaves[1:], *args, **kwargs)
    losses.sum().backward()
    return [losses.detach(), *(x.grad for x in leaves)]


def torch_losses(teacher, students, target, *, tau=1.0, label_smoothing=0.0, class_weight=None, ignore_index=-100):
    """What a user would write with torch alone, in the logits' own dtype."""
    weight = None if class_weight is None else class_weight.to(teacher.dtype)
    losses = [F.cross_entropy(teacher, target, weight, ignore_index=ignore_index, label_smoothing=label_smoothing)]
    soft = F.softmax(teacher.detach() / tau, dim=1)
    losses += [tau**2 * F.kl_div(F.log_softmax(s / tau, 1), soft, reduction="batchmean") for s in students]
    return torch.stack(losses)


def assert_all_as_exact_as_torch(ours, theirs, exact):
    """Err(ours) <= 2 err(torch), and a rounding of the probabilities that a gradient is the difference of."""
    tiny = 1e-13 if ours[0].dtype == torch.float64 else 2.0**-23
    for mine, torchs, truth in zip(ours, theirs, exact, strict=True):
        assert mine.shape == truth.shape
        assert torch.equal(mine.isnan(), truth.isnan())
        if not truth.numel() or truth.isnan().all():
            continue
        allowed = 2 * (torchs.double() - truth).abs().max() + tiny * max(1 / len(truth), truth.abs().max())
        error = (mine.double() - truth).abs().max()
        assert error <= allowed, f"error {error:.3g}, torch's own {allowed / 2:.3g}"
