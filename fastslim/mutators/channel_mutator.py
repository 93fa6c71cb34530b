"""Turn a model into a supernet: find its channel units, put slim layers in, choose widths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from fastslim.errors import FastslimError, FastslimRuntimeError, FastslimTypeError, FastslimValueError, nearest
from fastslim.graph import LayerSpec, Trace, UnitSpec
from fastslim.graph.rewrite import RewrittenForward
from fastslim.mutators.analyzer import ChannelAnalyzer, parse_analyzer_config, written
from fastslim.mutators.channel import related_channels
from fastslim.mutators.choices import Choices, Unit, UnitChoices
from fastslim.mutators.predefined import has_mutables, prepare_picking, units_of_configs, units_of_mutables
from fastslim.mutators.swap import rewrite_forwards, swap_layers
from fastslim.mutators.unit_configs import parse_unit_configs
from fastslim.nn import SlimLayer
from fastslim.registry import MODELS

__all__ = ["ChannelMutator", "Choices", "Unit"]


@MODELS.register_module()
class ChannelMutator(UnitChoices):
    """Finds and holds the channel units of a supernet.

    Args:
        channel_unit_cfg: a unit class or its name; ``dict(type=..., default_args=..., units=...)``, where `units` holds
            configs of single units by name (``init_args``, ``choice``, ``channels``), as `config_template` writes
            them, or is a file with them; or the path of a JSON or YAML file. See `parse_unit_configs`.
        parse_cfg: how the units are found. A `ChannelAnalyzer`, or ``dict(type="ChannelAnalyzer",
            demo_input=(1, 3, 224, 224), tracer_type="BackwardTracer")``: by following the channels through a forward.
            ``dict(type="Config")``: only units that `channel_unit_cfg` lists may change; a model that cannot run
            `demo_input` needs their ``channels`` there. ``dict(type="Predefined")``: the model's layers follow mutables
            already (or are slim layers).
        init_cfg: kept for compatibility; weights are never initialised anew.
        example_inputs: what the model is traced with, in the place of `demo_input`.
        exclude: names or patterns of modules whose output channels stay full.
        include: names or patterns of modules whose output channels may change; all, when empty.
        random_widths: "per_unit" draws one width for each unit, "uniform" one ratio for all of a subnet.
        seed: of the random widths; None takes one from the operating system.
    """

    default_unit: Any = dict(type="SequentialMutableChannelUnit")

    def __init__(
        self,
        channel_unit_cfg: Any = None,
        parse_cfg: Mapping[str, Any] | ChannelAnalyzer | None = None,
        init_cfg: Any = None,
        *,
        example_inputs: Any = None,
        exclude: Sequence[str] = (),
        include: Sequence[str] = (),
        random_widths: str = "per_unit",
        seed: int | None = None,
    ) -> None:
        super().__init__(random_widths, seed)
        self.configs = parse_unit_configs(channel_unit_cfg, self.default_unit)
        given = self.configs.parse_cfg if parse_cfg is None else parse_cfg
        self.parse_cfg = parse_analyzer_config({} if given is None else given)
        self.init_cfg = init_cfg
        demo_input = self.parse_cfg["demo_input"] if example_inputs is None else example_inputs
        shape = written(demo_input)
        if isinstance(shape, (tuple, list)) and all(isinstance(size, int) for size in shape):
            self.parse_cfg["demo_input"] = tuple(shape)
        self.analyzer = ChannelAnalyzer(demo_input, self.parse_cfg["tracer_type"], include=include, exclude=exclude)
        if isinstance(given, ChannelAnalyzer) and example_inputs is None and not include and not exclude:
            self.analyzer = given
        self._supernet: nn.Module | None = None
        self._trace: Trace | None = None
        self._layers: dict[str, SlimLayer] = {}
        # What nine calls of a step look at: layers, unit, channels of the layer's at how many of the unit's.
        self._prefixes: list[tuple[SlimLayer, int, int, int]] = []
        self._others: list[tuple[SlimLayer, LayerSpec]] = []
        self._rewritten: list[RewrittenForward] = []

    @property
    def unit_class(self) -> type[Unit]:
        """The class of all units."""
        return self.configs.unit_class

    @property
    def unit_default_args(self) -> dict[str, Any]:
        """The arguments of every unit."""
        return self.configs.default_args

    @property
    def unit_configs(self) -> dict[str, dict[str, Any]]:
        """What is said of single units, by name."""
        return self.configs.units

    def prepare_from_supernet(self, supernet: nn.Module) -> None:
        """Finds the units of a model, puts slim layers with the same weights in, and sets the widest choices.

        Args:
            supernet: any module; it is left as it was when this fails.

        Raises:
            FastslimRuntimeError: when it was called before, or the model cannot be traced.
            FastslimValueError: when units are configured that the model does not have.
        """
        if self._supernet is not None:
            raise FastslimRuntimeError("this mutator is already prepared; make a new one for another supernet")
        if not isinstance(supernet, nn.Module):
            raise FastslimTypeError(f"the supernet must be a torch.nn.Module, got {type(supernet).__name__}")
        kind = self.parse_cfg["type"]
        if has_mutables(supernet):
            if kind != "Predefined":
                raise FastslimRuntimeError(
                    "layers of this model follow mutables of its own; use parse_cfg=dict(type='Predefined')"
                )
            self._units = units_of_mutables(supernet, self.configs)
        else:
            listed_only = kind == "Config" or bool(self.parse_cfg.get("from_cfg"))
            try:
                found = self.analyzer.trace(supernet)
            except FastslimError as untraceable:
                if not listed_only:
                    raise
                self._units = units_of_configs(supernet, self.configs, untraceable)
            else:
                self._prepare_traced(supernet, found, listed_only)
        self._supernet = supernet

    def _prepare_traced(self, supernet: nn.Module, found: Trace, listed_only: bool) -> None:
        for name in self.unit_configs:
            known = [spec.name for spec in found.units]
            if name not in known:
                raise FastslimValueError(
                    f"channel_unit_cfg configures {name!r}, which is no unit of this model; {nearest(name, known)}; "
                    "or is it the config of another model?"
                )
        units = {spec.name: self._make_unit(spec, listed_only) for spec in found.units}
        for name, config in self.unit_configs.items():
            if "channels" in config:
                given = self.unit_class.init_from_cfg(supernet, {"init_args": {"num_channels": 1}, **config})
                given.name = name
                given.check_channels(supernet)
        chosen = {
            name: units[name].as_width(config["choice"])
            for name, config in self.unit_configs.items()
            if "choice" in config
        }
        if self.unit_class.picks_channels:
            prepare_picking(supernet, units, found)
            self._units = units
            self.set_max_choices()
            self.set_choices(chosen)
            return
        self._layers = self._swap(supernet, found, units)
        self._sort_layers(found)
        self._rewritten = rewrite_forwards(supernet, found)
        self._trace, self._units = found, units
        for unit, (inputs, outputs) in zip(units.values(), related_channels(found), strict=True):
            unit.input_related, unit.output_related = inputs, outputs
            unit.on_change = self._apply
        self.set_max_choices()
        self.set_choices(chosen)

    def _swap(self, supernet: nn.Module, found: Trace, units: dict[str, Unit]) -> dict[str, SlimLayer]:
        return swap_layers(supernet, found)

    def _sort_layers(self, found: Trace) -> None:
        for name, layer in self._layers.items():
            spec = found.layers[name]
            if len(spec.out) == len(spec.inputs) == 1 and not spec.heads:  # prefixes on both sides, as most layers
                unit, channels = spec.out[0]
                if unit is not None:
                    self._prefixes.append((layer, unit, channels, spec.units[unit].channels))
            else:
                self._others.append((layer, spec))

    def _make_unit(self, spec: UnitSpec, listed_only: bool) -> Unit:
        if self.unit_class.picks_channels and spec.counted:
            spec = replace(spec, mutable=False, reason="a channel shuffle takes as many channels, not the same ones")
        if listed_only and spec.name not in self.unit_configs:
            spec = replace(spec, mutable=False, reason=spec.reason or "not listed in channel_unit_cfg")
        arguments = {**self.unit_default_args, **self.unit_configs.get(spec.name, {}).get("init_args", {})}
        arguments.pop("unit_predefined", None)
        asked = arguments.pop("num_channels", spec.channels)
        if asked != spec.channels:
            raise FastslimValueError(
                f"the config of unit {spec.name!r} is for another number of channels: {asked}, but the model's unit "
                f"has {spec.channels}; is it the config of another model?"
            )
        try:
            return self.unit_class(spec.channels, **arguments, spec=spec)
        except TypeError as error:
            if isinstance(error, FastslimTypeError):
                raise
            known = (*self.unit_class.init_args, "candidate_mode")
            hints = [f"{key!r}: {nearest(key, known)}" for key in arguments if key not in known]
            raise FastslimTypeError(
                f"{self.unit_class.__name__} cannot be made from {arguments}: {'; '.join([str(error), *hints])}"
            ) from error

    def is_prepared_for(self, supernet: nn.Module) -> bool:
        """Whether `prepare_from_supernet` was called with this very model."""
        return self._supernet is not None and self._supernet is supernet

    @property
    def supernet(self) -> nn.Module:
        """The model this mutator was prepared with.

        Raises:
            FastslimRuntimeError: before `prepare_from_supernet`.
        """
        assert self.name2unit is not None  # or the error that says what to call
        assert self._supernet is not None
        return self._supernet

    @property
    def is_traced(self) -> bool:
        """Whether there is a `trace`."""
        return self._trace is not None

    @property
    def trace(self) -> Trace:
        """Units, layers and report of the supernet.

        Raises:
            FastslimRuntimeError: before `prepare_from_supernet`, or when the units were found without a trace.
        """
        if self._trace is None and self.name2unit is not None:
            raise FastslimRuntimeError(
                "this mutator's units were found without running the model (they are predefined, or listed in the "
                "config and demo_input does not fit the model), or pick channels that are not the first ones, so that "
                "costs and fused passes are not available; "
                "prepare a network of plain torch layers with example_inputs that fit"
            )
        assert self._trace is not None
        return self._trace

    @property
    def layers(self) -> dict[str, SlimLayer]:
        """The slim layers by module name."""
        return self._layers if self.trace else {}

    def _apply(self) -> None:
        if self._trace is None:
            return  # the layers ask the units' mutables
        widths = [unit.width for unit in self.name2unit.values()]
        # The widths fit by construction; nn.Module's attribute machinery would cost more than all the rest.
        for layer, unit, channels, of in self._prefixes:
            layer.__dict__["active_out"] = channels * widths[unit] // of
        for layer, spec in self._others:
            layer.__dict__.update(spec.state(widths))
        for forward in self._rewritten:
            forward.set_widths(widths)

    def layers_with_specs(self) -> Iterator[tuple[SlimLayer, LayerSpec]]:
        """Every slim layer, and how its channels follow the widths of the units in the order of :attr:`units`."""
        for name, layer in self._layers.items():
            yield layer, self.trace.layers[name]

    def config_template(
        self,
        only_mutable_units: bool = False,
        with_unit_init_cfg: bool = False,
        with_channels: bool = False,
        *,
        with_unit_init_args: bool = False,
    ) -> dict[str, Any]:
        """A config from which the same mutator, with the same present choices, can be built.

        Args:
            only_mutable_units: leave out units that stay at full width.
            with_unit_init_cfg: write every unit's own arguments.
            with_channels: write which channels of which layers belong to a unit.
            with_unit_init_args: another name of `with_unit_init_cfg`.

        Returns:
            A dict of plain values.
        """
        units = self.mutable_units if only_mutable_units else self.units
        with_init_args = with_unit_init_cfg or with_unit_init_args
        return dict(
            type=type(self).__name__,
            channel_unit_cfg=dict(
                type=self.unit_class.__name__,
                default_args=dict(self.unit_default_args),
                units={unit.name: unit.config_template(with_init_args, with_channels) for unit in units},
            ),
            parse_cfg=dict(self.parse_cfg),
        )
