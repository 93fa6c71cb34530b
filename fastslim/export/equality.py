"""How far the outputs of two forms of a network lie apart."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastslim.algorithms.slimmable import SlimmableAlgorithm
from fastslim.errors import FastslimRuntimeError
from fastslim.export.calls import Call, call_with, informative
from fastslim.export.sources import at_subnet, mutator_from
from fastslim.mutators import ChannelMutator

# Of the output's largest value. Kernels sum in different orders: 2e-15 and 1e-6 were seen on a ResNet-18.
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Equality:
    """A comparison of two outputs.

    Attributes:
        difference: largest absolute difference of two entries.
        scale: largest absolute entry of the reference.
        tolerance: which part of the scale the difference may be.
    """

    difference: float
    scale: float
    tolerance: float

    @property
    def relative(self) -> float:
        """The difference as a part of the scale."""
        return self.difference / self.scale if self.scale else self.difference

    @property
    def holds(self) -> bool:
        """Whether they are equal up to the tolerance."""
        return self.relative <= self.tolerance

    def __str__(self) -> str:
        return f"largest difference {self.difference:.1e} of {self.scale:.3g} (tolerance {self.tolerance:.0e} of it)"


def compare(expected: Any, got: Any, tolerance: float | None = None) -> Equality:
    """Compares two outputs, tensor by tensor; a NaN in the place of a number counts as infinitely far.

    Args:
        expected: a tensor or a structure of tensors.
        got: the same; arrays do, too.
        tolerance: part of the output's scale; by default 1e-10 in float64, 1e-5 in float32.
    """
    wanted = [value for value in pytree.tree_leaves(expected) if isinstance(value, Tensor)]
    given = [torch.as_tensor(value) for value in pytree.tree_leaves(got) if hasattr(value, "shape")]
    if tolerance is None:
        tolerance = max((_TOLERANCES.get(tensor.dtype, 0.0) for tensor in wanted), default=0.0)
    if [tensor.shape for tensor in wanted] != [tensor.shape for tensor in given]:
        return Equality(float("inf"), 0.0, tolerance)
    difference = scale = 0.0
    for tensor, other in zip(wanted, given, strict=True):
        if not tensor.numel():
            continue
        a, b = (t.detach().cpu().to(torch.complex128 if t.is_complex() else torch.float64) for t in (tensor, other))
        same = (a == b) | (a.isnan() & b.isnan())
        gaps = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))
        difference = max(difference, gaps.max().item())
        scale = max(scale, a.abs().nan_to_num(nan=0.0, posinf=0.0).max().item())
    return Equality(difference, scale, tolerance)


def require_equal(
    what: str, module: nn.Module, call: Call, got: Any, tolerance: float | None = None, expected: Any = None
) -> Equality:
    """Compares an output with a plain network's.

    Args:
        what: made the output, for the message.
        module: the network.
        call: what it is called with.
        got: the output to compare.
        tolerance: part of the output's scale. By default as `compare`, and no less than 10 times the network's own
            rounding error: behind dozens of batch norms on little data float32 itself was seen to be off by 5e-5. Never
            more than 100 times the usual one.
        expected: the network's output, if it is known.

    Raises:
        FastslimRuntimeError: the outputs differ by more than the tolerance.
    """
    expected = call.of(module) if expected is None else expected
    equality = compare(expected, got, tolerance)
    if not equality.holds and tolerance is None:
        # Capped: a network that draws random numbers differs from itself, too.
        least = min(10 * _rounding_error(module, call), 100 * equality.tolerance)
        equality = replace(equality, tolerance=max(equality.tolerance, least))
    if not equality.holds:
        raise FastslimRuntimeError(f"{what} computes something else than {type(module).__name__}: {equality}")
    return equality


def _rounding_error(module: nn.Module, call: Call) -> float:
    """How far outputs near a call's are from those of the same network in float64, as a part of their scale."""
    exact = copy.deepcopy(module).double()
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for _ in range(8):  # one output of ten logits can be right by luck

        def near(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return value * (1 + 1e-3 * torch.randn(value.shape, generator=generator).to(value))

        nearby = Call(*pytree.tree_map(near, (call.args, call.kwargs)))
        try:
            wide = nearby.cast(torch.float64).of(exact)
        except (RuntimeError, TypeError):  # a network that names its dtype: it has to be as near as all others
            return 0.0
        relative = compare(wide, nearby.of(module), 0.0).relative
        largest = max(largest, relative if math.isfinite(relative) else 0.0)
    return largest


def check_export(
    source: SlimmableAlgorithm | ChannelMutator | nn.Module,
    module: nn.Module,
    subnet: Mapping[str, Any] | None = None,
    inputs: Any = None,
    *,
    tolerance: float | None = None,
) -> Equality:
    """Compares an exported network with the supernet at that subnet, both in evaluation mode.

    Args:
        source: what was exported from.
        module: what `export_subnet` returned.
        subnet: width by unit name; the present one when None.
        inputs: what both are called with: a tensor, a tuple of arguments or a dict of keyword arguments; those the
            supernet was traced with when None (noise of their shape, if they are constant).
        tolerance: part of the output's scale. By default 1e-10 in float64, 1e-5 in float32, and no less than 10 times
            the rounding error of the exported network.

    Returns:
        The largest difference.

    Raises:
        FastslimRuntimeError: they differ by more than the tolerance.
    """
    mutator = mutator_from(source, "check_export")
    supernet = mutator.trace.model
    call = informative(call_with(module, mutator.trace.example_inputs if inputs is None else inputs))
    with at_subnet(source, mutator, subnet), evaluating(supernet), evaluating(module):
        return require_equal("the supernet at this subnet", module, call, call.of(supernet), tolerance)


class evaluating:
    """A context in which a network is in evaluation mode; afterwards each module is in its own again."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.modes = {part: part.training for part in self.module.modules()}
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        for part, mode in self.modes.items():
            part.training = mode
