"""Runs a network and compares what comes out; counts what torch executes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastslim.ops import use_backend

Widths = dict[str, int]


class CheckError(Exception):
    """A check that failed; its message says which."""


def run_at(model: nn.Module, mutator: Any, widths: Widths, inputs: Any) -> list[Tensor]:
    """The outputs at these widths."""
    mutator.set_choices(widths)
    return run(model, inputs)


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All tensors of forward's result, in evaluation mode."""
    torch.manual_seed(1)
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    return [leaf.clone() for leaf in tensors_in(result)]


def train(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Forward and backward in training mode; outputs and gradients. The model is back in evaluation mode after."""
    torch.manual_seed(1)
    model.train()
    try:
        result = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
        outputs = [leaf for leaf in tensors_in(result) if leaf.requires_grad]
        parameters = [p for p in model.parameters() if p.requires_grad]
        loss = sum((leaf.float() ** 2).mean() for leaf in outputs)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        model.eval()
    found = [gradient for gradient in gradients if gradient is not None]
    if not found:
        raise CheckError("no parameter has a gradient")
    return [leaf.detach() for leaf in outputs] + found


def tensors_in(value: Any) -> list[Tensor]:
    """Floating-point tensors in nested containers, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in tensors_in(item)]
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in tensors_in(item)]
    if is_dataclass(value):
        return [leaf for field in fields(value) for leaf in tensors_in(getattr(value, field.name))]
    return []


def in_double(value: Any) -> Any:
    """Inputs with floating-point tensors in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: in_double(item) for key, item in value.items()}
    return type(value)(in_double(item) for item in value) if isinstance(value, (tuple, list)) else value


def same(found: list[Tensor], expected: list[Tensor], tolerance: float, where: str) -> None:
    """Compares outputs; the error is relative to the largest value.

    Raises:
        CheckError: when they differ.
    """
    if [leaf.shape for leaf in found] != [leaf.shape for leaf in expected]:
        raise CheckError(f"{where}: other shapes")
    if (error := difference(found, expected)) > tolerance:
        raise CheckError(f"{where}: differs by {error:.1e}")


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of each tensor; infinite where only one is not finite."""
    errors = [0.0]
    for ours, theirs in zip(found, expected, strict=True):
        finite = torch.isfinite(theirs)
        if not torch.equal(torch.isfinite(ours), finite):
            return float("inf")
        if not torch.equal(ours, theirs.to(ours.dtype)) and finite.any():
            ours, theirs = ours.double()[finite], theirs.double()[finite]
            errors.append(float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)))
    return max(errors)


def masked(original: nn.Module, trace: Any, widths: Widths) -> nn.Module:
    """The original with every weight that belongs to an absent channel at zero."""
    model = copy.deepcopy(original)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name in trace.tensors:
            if name not in parameters:
                continue
            for dim, index in enumerate(trace.index_of(name, widths)):
                if index is not None:
                    keep = torch.zeros(parameters[name].shape[dim], dtype=torch.bool)
                    keep[index] = True
                    parameters[name].movedim(dim, 0)[~keep] = 0
    return model


def normalized_units(model: nn.Module, mutator: Any) -> set[str]:
    """Units whose channels a layer or RMS norm averages over; there absent is not the same as zero."""
    names = [unit.name for unit in mutator.units]
    held: set[str] = set()
    for prefix, module in model.named_modules():
        kind = type(module).__name__.lower()
        whole = isinstance(module, nn.GroupNorm) and module.num_groups == 1
        if whole or isinstance(module, nn.LayerNorm) or re.search("layer_?norm|rms_?norm|t5.*norm|groupnorm1", kind):
            for tensor, _ in module.named_parameters(recurse=False):
                for parts in mutator.trace.tensors.get(f"{prefix}.{tensor}", ()):
                    held |= {names[unit] for unit, _ in parts or () if unit is not None}
    return held & set(mutator.max_choices)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.found.append((str(packet), flop_registry[packet](*args, **(kwargs or {}), out_val=result) // 2))
        elif "rnn_layer" in str(packet):  # LSTMs, which torch does not count
            weights = sum(weight.numel() for weight in args[1:3])
            self.found.append((str(packet), args[0].shape[0] * args[0].shape[1] * weights))
        return result


def executed_multiply_adds(function: Callable[[], Any]) -> list[tuple[str, int]]:
    """(operation, multiply-adds) of everything torch runs, attention as its matrix products."""
    with use_backend("reference"), sdpa_kernel(SDPBackend.MATH), _Counter() as counter:
        function()
    return counter.found
