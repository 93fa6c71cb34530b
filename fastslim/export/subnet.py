"""Hand out a subnet as a plain network: ordinary torch layers of exactly its size, nothing of fastslim inside."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastslim.algorithms.slimmable import SlimmableAlgorithm
from fastslim.errors import FastslimTypeError
from fastslim.export.plain_forward import plain_module
from fastslim.graph.rewrite import RewrittenForward
from fastslim.graph.units import LayerSpec, active
from fastslim.mutators import ChannelMutator, mutator_of
from fastslim.nn import SlimLayer, SlimMultiheadAttention


def export_subnet(
    source: SlimmableAlgorithm | ChannelMutator | nn.Module, subnet: Mapping[str, Any] | None = None
) -> nn.Module:
    """A subnet as a plain network, with copies of the weights it uses.

    The network's own classes and forward stay, with plain torch layers inside. Where a forward mentions channel
    counts as constants, that module becomes a `torch.fx.GraphModule` of its recorded forward, which holds for
    arguments like the example inputs', and in evaluation mode only where training mode computes something else than
    other constants (it says so when it is called). The result needs no fastslim to run or to load.

    Args:
        source: an AutoSlim, a mutator, or a model that `fastslim.convert` has converted; it stays as it is.
        subnet: width by unit name, as the mutator's `set_choices` takes it; the present one when None.

    Returns:
        The network, in the mode (training or evaluation) of the source.

    Raises:
        FastslimTypeError: when source holds no subnets.
        FastslimValueError: when subnet does not fit.
    """
    mutator = _mutator(source)
    before = mutator.current_choices
    if isinstance(source, SlimmableAlgorithm) and subnet is not None:
        return _at(source, mutator, subnet)
    if subnet is not None:
        mutator.set_choices(subnet)
    try:
        return _plain_copy(mutator)
    finally:
        mutator.set_choices(before)


def _mutator(source: Any) -> ChannelMutator:
    if isinstance(source, ChannelMutator):
        return source
    mutator = source.mutator if isinstance(source, SlimmableAlgorithm) else None
    if mutator is None and isinstance(source, nn.Module):
        mutator = mutator_of(source)
    if mutator is None:
        raise FastslimTypeError(
            f"export_subnet takes an AutoSlim, a mutator or a model converted by fastslim.convert, "
            f"got {type(source).__name__}"
        )
    return mutator


def _at(algorithm: SlimmableAlgorithm, mutator: ChannelMutator, subnet: Mapping[str, Any]) -> nn.Module:
    """With the batch-norm statistics that are calibrated for the subnet."""
    before = mutator.current_choices
    algorithm.set_subnet(subnet)
    try:
        return _plain_copy(mutator)
    finally:
        algorithm.set_subnet(before)


@torch.no_grad()
def _plain_copy(mutator: ChannelMutator) -> nn.Module:
    trace = mutator.trace
    model = trace.model
    widths = [unit.width for unit in mutator.units]
    memo: dict[int, Any] = {}
    tied: dict[int, nn.Parameter] = {}
    for name, layer in mutator.layers.items():
        if id(layer) not in memo:
            memo[id(layer)] = _plain_layer(layer, trace.layers[name], widths, tied)
    # They are left behind: each copied module gets its own forward back.
    memo[id(mutator)] = _LEFT_OUT
    memo[id(_LEFT_OUT)] = _LEFT_OUT
    modules = dict(model.named_modules(remove_duplicate=False))
    # From the inside outwards, so that a rewritten module finds its children copied.
    for name in sorted(trace.rewrites, key=lambda name: -name.count(".") - bool(name)):
        module = modules[name]
        forward = module.__dict__["forward"]
        assert isinstance(forward, RewrittenForward)
        memo[id(forward)] = forward.before if forward.before is not None else _LEFT_OUT
        if forward.narrow:
            memo[id(module)] = plain_module(module, forward, widths, memo)
    plain = copy.deepcopy(model, memo)
    for module in plain.modules():
        for key in [key for key, value in vars(module).items() if value is _LEFT_OUT]:
            del module.__dict__[key]
        # Of a batch norm with a forward of its own, at full width.
        calibrated = module.__dict__.pop("calibrated", None)
        if calibrated is not None and isinstance(module, nn.modules.batchnorm._BatchNorm):
            for name, value in zip(("running_mean", "running_var"), calibrated, strict=True):
                getattr(module, name).copy_(value)
    return plain


class _LeftOut:
    """Marks attributes that a plain copy does not have."""


_LEFT_OUT = _LeftOut()


def _plain_layer(layer: SlimLayer, spec: LayerSpec, widths: Sequence[int], tied: dict[int, nn.Parameter]) -> nn.Module:
    if isinstance(layer, SlimMultiheadAttention):
        query, key, value = (active(dim, widths, spec.units)[0] for dim in (spec.input_dim, spec.key, spec.value))
        return _with_hooks(layer.to_torch(query, key_channels=key, value_channels=value), layer)
    plain = layer.to_torch(active(spec.input_dim, widths, spec.units)[0])
    for name, parameter in layer._parameters.items():
        own = plain._parameters.get(name)
        if parameter is None or own is None:
            continue
        shared = tied.setdefault(id(parameter), own)
        if shared.shape == own.shape and torch.equal(shared, own):
            plain._parameters[name] = shared
    return _with_hooks(plain, layer)


def _with_hooks(plain: nn.Module, layer: nn.Module) -> nn.Module:
    """Hooks change what a layer computes, so they are part of the network."""
    for key, value in vars(layer).items():
        if key.startswith("_") and "hooks" in key and isinstance(value, dict):
            plain.__dict__[key] = copy.copy(value)
    return plain
