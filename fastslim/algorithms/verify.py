"""Compares the fast step with the plain loop: `torch.nn.functional` on `weight[:o, :i]`, nothing else."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastslim.algorithms.autoslim import AutoSlim
from fastslim.ops import use_backend

Values = dict[str, Tensor]
#: The fast step in float64 may differ from the plain loop in float64 by rounding, amplified by the network.
EXACT = 1e-9
#: In low precision an activation whose input lies at its kink may fall on the other side, in either
#: loop, and changes the gradients of all layers before it by up to this.
KINK = 0.05


@dataclass
class Comparison:
    """Errors of one kind of value against the plain loop in float64, relative to each tensor's size.

    Attributes:
        kind: "losses", "gradients" or "statistics".
        exact: largest error of the fast step in float64.
        ours: typical (median) error of the fast step in the algorithm's own data type.
        plain: typical error of the plain loop in that type.
        allowed: the bound on `ours`.
        largest: largest error of the fast step in that type; one tensor that is wrong shows here.
        worst: name of the tensor it belongs to.
        limit: the bound on `largest`.
    """

    kind: str
    exact: float
    ours: float
    plain: float
    allowed: float
    largest: float
    worst: str
    limit: float

    @property
    def holds(self) -> bool:
        """Whether all three bounds hold."""
        return self.exact <= EXACT and self.ours <= self.allowed and self.largest <= self.limit


@dataclass
class Report:
    """What :func:`verify` found; prints as a table, is true when the fast step is exact."""

    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether every error is within its bound."""
        return all(c.holds for c in self.comparisons)

    def __bool__(self) -> bool:
        return self.exact

    def __str__(self) -> str:
        lines = [f"{'':12}{'float64':>10}{'fast step':>11}{'plain loop':>11}{'allowed':>10}{'largest':>10}  of"]
        lines += [
            f"{c.kind:12}{c.exact:10.1e}{c.ours:11.1e}{c.plain:11.1e}{c.allowed:10.1e}{c.largest:10.1e}  {c.worst}"
            for c in self.comparisons
        ]
        return "\n".join([*lines, "exact" if self.exact else "NOT EXACT: please report this with the model's code"])


def verify(algo: AutoSlim, batch: Any) -> Report:
    """Runs the same sandwich step by the fast path and by the plain loop, and compares the two.

    Losses, every gradient and every running statistic are compared with the plain loop in float64.
    In float64 the fast step must be equal up to rounding; in the algorithm's own data type it may
    err, typically, at most twice as much as the plain loop does. `algo` itself is left as it is.

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
        with torch.autocast(device, enabled=False):
            exact = _values(copy.deepcopy(algo).double(), _double(batch), seed)
        with use_backend("reference"):
            plain = _values(_without_plan(algo), batch, seed)
            with torch.autocast(device, enabled=False):
                truth = _values(_without_plan(algo).double(), _double(batch), seed)
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    eps = torch.finfo(low or next(algo.architecture.parameters()).dtype).eps
    return Report([_compare(kind, exact[kind], ours[kind], plain[kind], true, eps) for kind, true in truth.items()])


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


def _compare(kind: str, exact: Values, ours: Values, plain: Values, truth: Values, eps: float) -> Comparison:
    if ours.keys() != truth.keys():
        name = f"{min(ours.keys() ^ truth.keys())}: present on one side only"
        return Comparison(kind, float("inf"), 0.0, 0.0, 0.0, float("inf"), name, 0.0)
    if not truth:
        return Comparison(kind, 0.0, 0.0, 0.0, 0.0, 0.0, "none", 0.0)
    largest_norm = max(float(true.double().norm()) for true in truth.values())
    precise, mine, theirs = (
        {name: _error(values[name], true, 1e-3 * largest_norm) for name, true in truth.items()}
        for values in (exact, ours, plain)
    )
    typical, plain_typical = (statistics.median(errors.values()) for errors in (mine, theirs))
    worst = max(mine, key=mine.__getitem__)
    return Comparison(
        kind,
        max(precise.values()),
        typical,
        plain_typical,
        # 16 eps: what rounding order alone may change where the plain loop happens to be exact.
        max(2 * plain_typical + 16 * eps, KINK if kind == "gradients" else 0.0),
        mine[worst],
        worst,
        max(2 * max(theirs.values()), 2 * KINK),
    )


def _error(value: Tensor, truth: Tensor, floor: float) -> float:
    """Error in the 2-norm, relative to the truth, or to `floor` where the truth is zero but for rounding."""
    scale = max(float(truth.double().norm()), floor)
    return float((value.double() - truth.double()).norm()) / scale if scale else 0.0
