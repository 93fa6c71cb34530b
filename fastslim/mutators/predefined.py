"""Units without a trace: of models whose layers follow mutables already, or whose config lists the channels."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from fastslim.errors import FastslimError, FastslimRuntimeError, FastslimValueError
from fastslim.graph import Trace
from fastslim.mutators.channel import Channel, related_channels
from fastslim.mutators.derived_mutable import sources_of
from fastslim.mutators.mutable_channel import SquentialMutableChannel
from fastslim.mutators.unit_configs import UnitConfigs
from fastslim.mutators.units import SequentialMutableChannelUnit
from fastslim.nn import DynamicChannelMixin

Units = dict[str, SequentialMutableChannelUnit]


def has_mutables(model: nn.Module) -> bool:
    """Whether some layer of a model follows mutables."""
    return any(isinstance(module, DynamicChannelMixin) and len(module.mutable_attrs) for module in model.modules())


def units_of_mutables(model: nn.Module, configs: UnitConfigs) -> Units:
    """One unit for every mutable that layers of the model follow.

    Args:
        model: its layers follow mutables.
        configs: says the class; ``unit_predefined`` among the default arguments leaves the mutables' present choice,
            else the widest is set.
    """
    units: dict[int, SequentialMutableChannelUnit] = {}
    for name, module in model.named_modules():
        if not isinstance(module, DynamicChannelMixin):
            continue
        for attr, is_output in (("in_channels", False), ("out_channels", True)):
            mutable = module.get_mutable_attr(attr) if module.accepted_mutable_attrs else None
            for index, part in _parts(mutable):
                for source in sources_of(part):
                    if not isinstance(source, SquentialMutableChannel):
                        continue
                    if id(source) not in units:
                        units[id(source)] = configs.unit_class.init_from_mutable_channel(source)
                    add = units[id(source)].add_output_related if is_output else units[id(source)].add_input_related
                    add(Channel(name, module, index, is_output_channel=is_output))
    if not configs.default_args.get("unit_predefined", False):
        for unit in units.values():
            unit.current_choice = unit.max_choice
    return {unit.name: unit for unit in units.values()}


def prepare_picking(model: nn.Module, units: Units, found: Trace) -> None:
    """Lets the layers of a traced model ask for the channels of units that pick them.

    Raises:
        FastslimRuntimeError: a forward of the model mentions numbers of channels, which holds for the first ones only.
    """
    if found.rewritten:
        finding = found.rewritten[0]
        raise FastslimRuntimeError(
            f"the forward of {finding.subject} would have to be rewritten ({finding.reason}), which fits units that "
            "keep the first channels only: order the channels with sort_channels, and use SequentialMutableChannelUnit"
        )
    for unit, (inputs, outputs) in zip(units.values(), related_channels(found), strict=True):
        unit.input_related, unit.output_related, unit.is_traced = inputs, outputs, False
    for unit in units.values():
        if unit.spec.mutable:
            unit.prepare_for_pruning(model)


def _check_apart(units: Units) -> None:
    """Refuses channels that several units claim."""
    taken: dict[tuple[str, bool], list[tuple[tuple[int, int], str]]] = {}
    for name, unit in units.items():
        for channel in (*unit.input_related, *unit.output_related):
            others = taken.setdefault((channel.name, channel.is_output_channel), [])
            for (start, end), other in others:
                if start < channel.end and channel.start < end:
                    raise FastslimValueError(f"units {name!r} and {other!r} both have channels of {channel.name!r}")
            others.append((channel.index, name))


def _parts(mutable: Any) -> list[tuple[tuple[int, int], Any]]:
    if mutable is None:
        return []
    ranges: Mapping[tuple[int, int], Any] | None = getattr(mutable, "mutable_channels", None)
    return list(ranges.items()) if ranges is not None else [((0, len(mutable.current_mask)), mutable)]


def units_of_configs(model: nn.Module, configs: UnitConfigs, untraceable: FastslimError) -> Units:
    """The units that a config lists with their channels; the layers become slim ones that follow them.

    Args:
        model: any module.
        configs: its units say their channels.
        untraceable: why the model could not be traced.

    Raises:
        FastslimRuntimeError: a unit does not say its channels.
        FastslimValueError: the config is of another model; nothing is changed then.
    """
    lacking = [name for name, config in configs.units.items() if "channels" not in config]
    if lacking or not configs.units:
        which = f"unit {lacking[0]!r} does not say its channels" if lacking else "it lists no units"
        raise FastslimRuntimeError(
            f"parse_cfg type 'Config' needs units with their channels, but {which} "
            "(config_template(with_channels=True) writes them), or a demo_input that the model can be traced with: "
            f"{untraceable}"
        ) from untraceable
    units: Units = {}
    for name, config in configs.units.items():
        arguments = {**configs.default_args, **config.get("init_args", {})}
        unit = configs.unit_class.init_from_cfg(model, {**copy.deepcopy(config), "init_args": arguments})
        unit.name = name
        units[name] = unit
    for unit in units.values():
        unit.check_channels(model)
    _check_apart(units)
    for name, unit in units.items():
        unit.prepare_for_pruning(model)
        unit.current_choice = configs.units[name].get("choice", unit.max_choice)
    return units
