"""A mutator's present subnet as a plain network: ordinary torch layers of exactly its size."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastslim.graph.plain_forward import plain_module
from fastslim.graph.rewrite import RewrittenForward
from fastslim.graph.units import LayerSpec, active
from fastslim.mutators.channel_mutator import ChannelMutator
from fastslim.nn import SlimLayer, SlimMultiheadAttention


@torch.no_grad()
def plain_copy(mutator: ChannelMutator) -> nn.Module:
    """The supernet at its present widths, with copies of the weights in use and nothing of fastslim inside.

    Args:
        mutator: one that is prepared; its supernet stays as it is.
    """
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
