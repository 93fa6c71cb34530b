"""Whether a model still computes the same: its outputs, and what its layers return on the way, on example inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastslim.graph import Trace
from fastslim.graph.capture import unchanged

_MIXING = ("conv", "conv_transpose", "linear", "attention")


class FunctionCheck:
    """Remembers what a model computes at full width, in evaluation mode.

    Args:
        trace: of the model.
        inputs: forward's arguments by name. Tensors of nothing but zeros, such as those made from a shape, are
            replaced by random ones: zeros would hide most differences.
    """

    def __init__(self, trace: Trace, inputs: Mapping[str, Any]) -> None:
        self.model = trace.model
        self.layers = [self.model.get_submodule(n) for n, layer in trace.layers.items() if layer.kind in _MIXING]
        self.inputs = {name: torch.utils._pytree.tree_map(_with_content, value) for name, value in inputs.items()}
        self.outputs, self.norms = self._run()

    def holds(self) -> bool:
        """Whether the model computes what it did, up to the rounding of another order of summation."""
        return self._agrees(*self._run())

    def _run(self) -> tuple[list[Tensor], list[Tensor]]:
        norms: list[Tensor] = []

        def note(module: nn.Module, args: Any, result: Any) -> None:
            # The norm over all channels stays when they change places, and tells of branches that hardly reach the
            # output yet, such as those behind a layer scale of 1e-6.
            value = next(_tensors(result))
            norms.append(torch.linalg.vector_norm(value, dtype=torch.float64))

        handles = [layer.register_forward_hook(note) for layer in self.layers]
        try:
            with unchanged(self.model), torch.no_grad():
                self.model.eval()
                torch.manual_seed(0)
                # Forward may write to its inputs.
                inputs = torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, self.inputs)
                outputs = [value.clone() for value in _tensors(self.model(**inputs))]
        finally:
            for handle in handles:
                handle.remove()
        return outputs, norms

    def _agrees(self, outputs: list[Tensor], norms: list[Tensor]) -> bool:
        if [o.shape for o in outputs] != [o.shape for o in self.outputs] or len(norms) != len(self.norms):
            return False
        types = [p.dtype for p in self.model.parameters()] + [o.dtype for o in outputs]
        # Errors of rounding are some 10 times eps, wrong channels some per cent: the root lies between.
        tolerance = max((torch.finfo(t).eps for t in types if t.is_floating_point), default=0.0) ** 0.5
        pairs = zip(self.outputs + self.norms, outputs + norms, strict=True)
        return all(_near(before, after, tolerance) for before, after in pairs)


def _near(before: Tensor, after: Tensor, tolerance: float) -> bool:
    wide = torch.complex128 if before.is_complex() else torch.float64
    before, after = before.to(wide), after.to(wide)
    same = (before == after) | (before.isnan() & after.isnan())
    difference = torch.where(same, 0, before - after).norm()
    scale = torch.where(before.isfinite(), before, 0).norm()
    return bool(difference <= tolerance * (scale + tolerance))


def _with_content(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.any():
        return value
    generator = torch.Generator().manual_seed(0)
    return torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in fields(value)]
    for item in value if isinstance(value, (tuple, list)) else ():
        yield from _tensors(item)
