"""Compares the fast step with the plain loop: `torch.nn.functional` on `weight[:o, :i]`, nothing else."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastslim.algorithms.autoslim import AutoSlim
from fastslim.ops import use_backend

Values = dict[str, Tensor]


@dataclass
class Comparison:
    """Largest errors of one kind of value, relative to its size, against float64.

    Attributes:
        kind: "losses", "gradients" or "statistics".
        ours: error of the fast step.
        plain: error of the plain loop in the same data type.
        worst: name of the value where ours is worst.
        allowed: the bound on `ours`.
    """

    kind: str
    ours: float
    plain: float
    worst: str
    allowed: float


@dataclass
class Report:
    """What :func:`verify` found; prints as a table, is true when the fast step is exact."""

    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether every error is within its bound."""
        return all(c.ours <= c.allowed for c in self.comparisons)

    def __bool__(self) -> bool:
        return self.exact

    def __str__(self) -> str:
        lines = [f"{'':12}{'fast step':>12}{'plain loop':>12}{'allowed':>12}  worst value"]
        lines += [f"{c.kind:12}{c.ours:12.1e}{c.plain:12.1e}{c.allowed:12.1e}  {c.worst}" for c in self.comparisons]
        return "\n".join([*lines, "exact" if self.exact else "NOT EXACT: please report this with the model's code"])


def verify(algo: AutoSlim, batch: Any) -> Report:
    """Runs the same sandwich step by the fast path and by the plain loop, and compares the two.

    Losses, every gradient and every running statistic are compared with the plain loop in float64:
    the fast step may err at most twice as much as the plain loop in the same data type does.
    `algo` itself is left as it is.

    Args:
        algo: what is checked, in training mode; under ``torch.autocast`` if it trains so.
        batch: a batch as for ``train_step``.

    Returns:
        A report that prints as a table and is true when every value is within its bound.
    """
    device = next(algo.architecture.parameters()).device.type
    # Copies start from the same weights and the same state of the width sampler.
    with torch.random.fork_rng(devices=[]):
        seed = torch.seed()
        ours = _values(copy.deepcopy(algo), batch, seed)
        with use_backend("reference"):
            plain = _values(_without_plan(algo), batch, seed)
            with torch.autocast(device, enabled=False):
                truth = _values(_without_plan(algo).double(), _double(batch), seed)
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    eps = torch.finfo(low or next(algo.architecture.parameters()).dtype).eps
    return Report([_compare(kind, ours[kind], plain[kind], truth[kind], eps) for kind in truth])


def _without_plan(algo: AutoSlim) -> AutoSlim:
    """A copy that runs the user's own forward; with reference ops its step is the plain loop."""
    plain = copy.deepcopy(algo)
    plain.__dict__["_plan"] = None
    return plain


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _double(item) for key, item in value.items()}
    return type(value)(map(_double, value)) if type(value) in (tuple, list) else value


def _values(algo: AutoSlim, batch: Any, seed: int) -> dict[str, Values]:
    torch.manual_seed(seed)
    losses = algo.accumulate(batch)
    return {
        "losses": {", ".join(losses): torch.stack([value.double() for value in losses.values()])},
        "gradients": {n: p.grad for n, p in algo.named_parameters() if p.grad is not None},
        "statistics": {n: b for n, b in algo.named_buffers() if b.is_floating_point()},
    }


def _compare(kind: str, ours: Values, plain: Values, truth: Values, eps: float) -> Comparison:
    if ours.keys() != truth.keys():
        missing = sorted(ours.keys() ^ truth.keys())
        return Comparison(kind, float("inf"), 0.0, f"present in one only: {missing[0]}", 0.0)
    errors = {n: (_distance(ours[n], true), _distance(plain[n], true)) for n, true in truth.items()}
    if not errors:
        return Comparison(kind, 0.0, 0.0, "none", 0.0)
    # 16 eps: what rounding order alone may change where the plain loop happens to be exact.
    excess = {n: mine - 2 * theirs - 16 * eps for n, (mine, theirs) in errors.items()}
    worst = max(excess, key=excess.__getitem__)
    mine, theirs = errors[worst]
    return Comparison(kind, mine, theirs, worst, 2 * theirs + 16 * eps)


def _distance(value: Tensor, truth: Tensor) -> float:
    """Relative error in the 2-norm."""
    difference = (value.double() - truth.double()).norm()
    return float(difference / truth.double().norm().clamp_min(1e-300)) if difference else 0.0
