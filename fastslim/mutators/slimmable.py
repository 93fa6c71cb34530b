"""SlimmableChannelMutator: a fixed list of subnets, each with batch-norm statistics of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastslim.errors import FastslimTypeError, FastslimValueError
from fastslim.graph import Trace
from fastslim.mutators.channel_mutator import ChannelMutator
from fastslim.mutators.choices import Choices, Unit
from fastslim.mutators.one_shot_units import SlimmableChannelUnit
from fastslim.mutators.swap import swap_layers
from fastslim.nn import SlimLayer, SwitchableBatchNorm2d
from fastslim.registry import MODELS


@MODELS.register_module()
class SlimmableChannelMutator(ChannelMutator):
    """Holds a fixed list of subnets; batch-norm layers get one set of statistics per width.

    Args:
        channel_unit_cfg: as for `ChannelMutator`, or a list of subnets (dicts from unit name to width). The n-th
            candidate of every unit belongs to the n-th subnet.
        parse_cfg: as for `ChannelMutator`.
        init_cfg: as for `ChannelMutator`.
        **kwargs: as for `ChannelMutator`.
    """

    default_unit: Any = dict(
        type="SlimmableChannelUnit",
        default_args=dict(candidate_choices=[0.25, 0.5, 0.75, 1.0], choice_mode="ratio", divisor=8),
    )

    def __init__(
        self, channel_unit_cfg: Any = None, parse_cfg: Any = None, init_cfg: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(channel_unit_cfg, parse_cfg, init_cfg, **kwargs)
        if not issubclass(self.unit_class, SlimmableChannelUnit):
            raise FastslimTypeError(
                f"SlimmableChannelMutator needs SlimmableChannelUnit, got {self.unit_class.__name__}"
            )

    def _swap(self, supernet: nn.Module, found: Trace, units: dict[str, Unit]) -> dict[str, SlimLayer]:
        subnets = _subnets(units)
        layers = swap_layers(supernet, found, {"bn": SwitchableBatchNorm2d})
        for name, layer in layers.items():
            if isinstance(layer, SwitchableBatchNorm2d):
                layer.init_candidates(found.layers[name].out_width(subnet) for subnet in subnets)
        return layers

    @property
    def subnets(self) -> list[Choices]:
        """The listed subnets, in their order; before there is a supernet, what the configs of its units list."""
        if not self.is_prepared:
            return _listed(self.unit_configs)
        mutable = {unit.name for unit in self.mutable_units}
        return [
            {name: width for name, width in subnet.items() if name in mutable} for subnet in _subnets(self.name2unit)
        ]

    def sample_choices(self, kind: str = "random") -> Choices:
        """One of the listed subnets; "max" and "min" as for `ChannelMutator`."""
        return self.rng.choice(self.subnets) if kind == "random" else super().sample_choices(kind)


def _listed(configs: Mapping[str, Mapping[str, Any]]) -> list[Choices]:
    listed = {name: config.get("init_args", {}).get("candidate_choices", []) for name, config in configs.items()}
    counts = {len(choices) for choices in listed.values()}
    return [{name: choices[i] for name, choices in listed.items()} for i in range(min(counts, default=0))]


def _subnets(units: Mapping[str, Unit]) -> list[Choices]:
    listed = {name: unit.subnet_widths for name, unit in units.items() if isinstance(unit, SlimmableChannelUnit)}
    count = max(map(len, listed.values()), default=1)
    for name, widths in listed.items():
        if len(widths) not in (1, count):
            raise FastslimValueError(
                f"unit {name!r} lists {len(widths)} widths, but others list {count}: "
                "give every unit one width per subnet"
            )
    return [{name: widths[i if len(widths) > 1 else 0] for name, widths in listed.items()} for i in range(count)]
