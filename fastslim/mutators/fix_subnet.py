"""Write down a subnet, and make a network the plain one of a written subnet, as MMRazor 1.x does."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastslim.errors import FastslimRuntimeError, FastslimTypeError, FastslimValueError, nearest
from fastslim.mutators.channel_mutator import ChannelMutator
from fastslim.mutators.derived_mutable import DerivedMutable
from fastslim.mutators.mutable import BaseMutable, DumpChosen
from fastslim.mutators.plain_copy import plain_copy
from fastslim.mutators.unit_configs import read_config
from fastslim.nn import DynamicMixin
from fastslim.registry import MODELS

_MODES = ("mutable", "mutator")


def export_fix_subnet(
    model: nn.Module, export_subnet_mode: str = "mutable", slice_weight: bool = False, export_channel: bool = False
) -> tuple[dict[str, Any], nn.Module | None]:
    """The present subnet as values that `load_fix_subnet` takes back.

    Args:
        model: a network whose layers follow mutables, or ("mutator") an algorithm with a prepared `mutator`.
        export_subnet_mode: "mutable" writes the choice of every mutable by its alias or module name, "mutator" the
            mutator's config with its present choices.
        slice_weight: return the plain network of the subnet, too: copies of the weights it uses.
        export_channel: write which channels of which layers belong to a unit ("mutator").

    Returns:
        The subnet, and the plain network or None.

    Raises:
        FastslimValueError: for another mode, or a model without a mutator.
    """
    _check_mode("export_subnet_mode", export_subnet_mode)
    if export_subnet_mode == "mutator":
        mutator = getattr(model, "mutator", None)
        if not isinstance(mutator, ChannelMutator):
            raise FastslimValueError(f"this {type(model).__name__} has no mutator; use export_subnet_mode='mutable'")
        subnet = mutator.config_template(with_unit_init_cfg=True, with_channels=export_channel)
        return subnet, plain_copy(mutator) if slice_weight else None
    chosen: dict[str, Any] = {name: mutable.dump_chosen() for name, mutable in _mutables(model)}
    if not slice_weight:
        return chosen, None
    plain = copy.deepcopy(model)
    load_fix_subnet(plain, chosen)
    return chosen, plain


def load_fix_subnet(
    model: nn.Module,
    subnet_dict: Mapping[str, Any] | str | Path,
    load_subnet_mode: str = "mutable",
    prefix: str = "",
    extra_prefix: str = "",
) -> None:
    """Makes a network the plain one of a written subnet, in place.

    Args:
        model: the network: with the same mutables ("mutable"), or of torch's own layers ("mutator").
        subnet_dict: what `export_fix_subnet` returned, or a JSON or YAML file with it.
        load_subnet_mode: how it was written.
        prefix: in front of the model's names, but not of the written ones.
        extra_prefix: in front of the written names only.

    Raises:
        FastslimRuntimeError: the model is one layer, which cannot replace itself, or the subnet lacks a mutable.
        FastslimTypeError: the subnet is no dict.
        FastslimValueError: for another mode, or a subnet of another network.
    """
    _check_mode("load_subnet_mode", load_subnet_mode)
    if prefix and extra_prefix:
        raise FastslimRuntimeError(f"prefix={prefix!r} and extra_prefix={extra_prefix!r} exclude each other; give one")
    subnet = read_config(subnet_dict, "subnet_dict") if isinstance(subnet_dict, (str, Path)) else subnet_dict
    if not isinstance(subnet, Mapping):
        raise FastslimTypeError(f"subnet_dict should be a file or a dict, got {type(subnet).__name__}")
    if isinstance(model, DynamicMixin):
        raise FastslimRuntimeError("the model is a single layer, which cannot replace itself; use its to_static_op()")
    if load_subnet_mode == "mutator":
        if "channel_unit_cfg" not in subnet:
            raise FastslimValueError("a subnet of mode 'mutator' is a mutator's config; channel_unit_cfg is missing")
        mutator = MODELS.build({**subnet, "parse_cfg": {**subnet.get("parse_cfg", {}), "from_cfg": True}})
        mutator.prepare_from_supernet(model)
        deploy(mutator)
        return
    for name, mutable in _mutables(model):
        key = name.removeprefix(prefix) if prefix else extra_prefix + name
        if key not in subnet:
            raise FastslimRuntimeError(f"the subnet has no mutable {key!r}; {nearest(key, subnet)}")
        chosen = subnet[key]
        chosen = DumpChosen(**chosen) if isinstance(chosen, Mapping) else DumpChosen(*chosen)
        if not mutable.is_fixed:
            mutable.fix_chosen(chosen.chosen)
    to_static(model)


def deploy(mutator: ChannelMutator) -> nn.Module:
    """Makes a mutator's supernet the plain network of its present subnet, in place; no other is left.

    Returns:
        The network.
    """
    network = mutator.supernet
    mutator.fix_channel_mutables()
    if not mutator.is_traced:
        return to_static(network)
    plain = plain_copy(mutator)
    network._modules, network._parameters, network._buffers = plain._modules, plain._parameters, plain._buffers
    network.__dict__.pop("forward", None)
    if type(plain) is not type(network):  # a forward that has numbers of channels in it was rewritten
        network.__dict__["forward"] = plain.forward
    return network


def to_static(model: nn.Module) -> nn.Module:
    """Puts torch's own layers, of the present width, in the places of all layers inside a model."""
    made: dict[int, nn.Module] = {}
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if isinstance(child, DynamicMixin):
                made.setdefault(id(child), child.to_static_op())
                parent._modules[key] = made[id(child)]
    return model


def _mutables(model: nn.Module) -> Iterator[tuple[str, BaseMutable]]:
    """Mutables with a choice of their own, once each, by alias or by the name of the module they are."""
    seen: set[int] = set()
    modules = list(model.named_modules())
    own = [(name, module) for name, module in modules if isinstance(module, BaseMutable) and not module.is_composite]
    derived = [
        (name, source)
        for name, module in modules
        if isinstance(module, DerivedMutable)
        for source in module.source_mutables
    ]
    names: dict[str, BaseMutable] = {}
    for name, mutable in (*own, *derived):
        if id(mutable) in seen:
            continue
        seen.add(id(mutable))
        key = mutable.alias or name
        if names.setdefault(key, mutable) is not mutable:
            raise FastslimRuntimeError(
                f"{key!r} follows several mutables, which need different aliases to be told apart"
            )
        yield key, mutable


def _check_mode(argument: str, mode: str) -> None:
    if mode not in _MODES:
        raise FastslimValueError(f"{argument} must be 'mutable' or 'mutator', got {mode!r}")
