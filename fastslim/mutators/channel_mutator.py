"""Turn a model into a supernet: find its channel units, put slim layers in, choose widths."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from fastslim.errors import FastslimRuntimeError, FastslimTypeError, FastslimValueError, nearest
from fastslim.graph import LayerSpec, Trace
from fastslim.graph.rewrite import RewrittenForward
from fastslim.mutators.analyzer import ChannelAnalyzer, parse_analyzer_config
from fastslim.mutators.swap import rewrite_forwards, swap_layers
from fastslim.mutators.units import SequentialMutableChannelUnit, unit_type
from fastslim.nn import SlimLayer
from fastslim.registry import MODELS

Unit = SequentialMutableChannelUnit
Choices = dict[str, int]


@MODELS.register_module()
class ChannelMutator:
    """Finds and holds the channel units of a supernet.

    Args:
        channel_unit_cfg: a unit class or its name, or ``dict(type=..., default_args=..., units=...)``; `units` holds
            configs of single units by name (``init_args`` and ``choice``), as `config_template` writes them.
        parse_cfg: ``dict(type="ChannelAnalyzer", demo_input=(1, 3, 224, 224), tracer_type="BackwardTracer")``.
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
        parse_cfg: Mapping[str, Any] | None = None,
        init_cfg: Any = None,
        *,
        example_inputs: Any = None,
        exclude: Sequence[str] = (),
        include: Sequence[str] = (),
        random_widths: str = "per_unit",
        seed: int | None = None,
    ) -> None:
        self.unit_class, self.unit_default_args, self.unit_configs = _parse_unit_config(
            self.default_unit if channel_unit_cfg is None else channel_unit_cfg
        )
        self.parse_cfg = parse_analyzer_config(parse_cfg or {})
        self.init_cfg = init_cfg
        if random_widths not in ("per_unit", "uniform"):
            raise FastslimValueError(f"random_widths must be 'per_unit' or 'uniform', got {random_widths!r}")
        self.random_widths = random_widths
        demo_input = self.parse_cfg["demo_input"] if example_inputs is None else example_inputs
        self.analyzer = ChannelAnalyzer(demo_input, self.parse_cfg["tracer_type"], include=include, exclude=exclude)
        self.rng = random.Random(seed)
        self._trace: Trace | None = None
        self._layers: dict[str, SlimLayer] = {}
        self._rewritten: list[RewrittenForward] = []
        self._units: dict[str, Unit] = {}

    def prepare_from_supernet(self, supernet: nn.Module) -> None:
        """Traces the model, puts slim layers with the same weights in, and sets the widest choices.

        Raises:
            FastslimRuntimeError: when it was called before, or the model cannot be traced.
        """
        if self._trace is not None:
            raise FastslimRuntimeError("this mutator is already prepared; make a new one for another supernet")
        found = self.analyzer.trace(supernet)
        units = {spec.name: self._make_unit(spec) for spec in found.units}
        for name in self.unit_configs:
            if name not in units:
                raise FastslimValueError(
                    f"channel_unit_cfg configures {name!r}, which is no unit of this model; {nearest(name, units)}"
                )
        self._layers = self._swap(supernet, found, units)
        self._rewritten = rewrite_forwards(supernet, found)
        self._trace, self._units = found, units
        for unit in units.values():
            unit.on_change = self._apply
        self.set_max_choices()
        chosen = {name: config["choice"] for name, config in self.unit_configs.items() if "choice" in config}
        if chosen:
            self.set_choices({**self.current_choices, **chosen})

    def _swap(self, supernet: nn.Module, found: Trace, units: dict[str, Unit]) -> dict[str, SlimLayer]:
        return swap_layers(supernet, found)

    def _make_unit(self, spec: Any) -> Unit:
        arguments = {**self.unit_default_args, **self.unit_configs.get(spec.name, {}).get("init_args", {})}
        if arguments.pop("num_channels", spec.channels) != spec.channels:
            raise FastslimValueError(f"the config of unit {spec.name!r} is for another number of channels")
        try:
            return self.unit_class(spec.channels, **arguments, spec=spec)
        except TypeError as error:
            if isinstance(error, FastslimTypeError):
                raise
            raise FastslimTypeError(f"{self.unit_class.__name__} cannot be made from {arguments}: {error}") from error

    def is_prepared_for(self, supernet: nn.Module) -> bool:
        """Whether `prepare_from_supernet` was called with this very model."""
        return self._trace is not None and self._trace.model is supernet

    @property
    def trace(self) -> Trace:
        """Units, layers and report of the supernet.

        Raises:
            FastslimRuntimeError: before `prepare_from_supernet`.
        """
        if self._trace is None:
            raise FastslimRuntimeError(f"{type(self).__name__} has no supernet yet; call prepare_from_supernet(model)")
        return self._trace

    @property
    def layers(self) -> dict[str, SlimLayer]:
        """The slim layers by module name."""
        return self._layers if self.trace else {}

    @property
    def units(self) -> list[Unit]:
        """All units, also those that stay at full width."""
        return list(self._units.values()) if self.trace else []

    @property
    def mutable_units(self) -> list[Unit]:
        """The units with more than one width."""
        return [unit for unit in self.units if unit.is_mutable]

    @property
    def search_groups(self) -> dict[int, list[Unit]]:
        """The mutable units, each in a group of its own."""
        return {i: [unit] for i, unit in enumerate(self.mutable_units)}

    @property
    def current_choices(self) -> Choices:
        """The present width of every mutable unit."""
        return {unit.name: unit.width for unit in self.mutable_units}

    @property
    def choice_template(self) -> Choices:
        """A dict as `set_choices` takes it."""
        return self.current_choices

    @property
    def max_choices(self) -> Choices:
        """The widest subnet."""
        return {unit.name: unit.candidate_widths[-1] for unit in self.mutable_units}

    @property
    def min_choices(self) -> Choices:
        """The narrowest subnet."""
        return {unit.name: unit.candidate_widths[0] for unit in self.mutable_units}

    def sample_choices(self, kind: str = "random") -> Choices:
        """A subnet: the width of every mutable unit.

        Args:
            kind: "random", "max" or "min".

        Raises:
            FastslimValueError: for another kind.
        """
        if kind == "max":
            return self.max_choices
        if kind == "min":
            return self.min_choices
        if kind != "random":
            raise FastslimValueError(f"kind must be 'random', 'max' or 'min', got {kind!r}")
        units = self.mutable_units
        if self.random_widths == "uniform" and units:
            widest = max(units, key=lambda unit: len(unit.candidate_widths))
            return self.uniform_choices(self.rng.choice(widest.candidate_widths) / widest.num_channels)
        return {unit.name: self.rng.choice(unit.candidate_widths) for unit in units}

    def uniform_choices(self, ratio: float) -> Choices:
        """The subnet in which every unit is as near to `ratio` of its full width as its candidates allow.

        Raises:
            FastslimValueError: unless 0 < ratio <= 1.
        """
        if not 0 < ratio <= 1:
            raise FastslimValueError(f"ratio must lie above 0 and up to 1, got {ratio!r}")
        return {unit.name: unit.nearest_width(ratio) for unit in self.mutable_units}

    def set_choices(self, choices: Mapping[str, Any]) -> None:
        """Sets the width of every mutable unit, and of all layers that follow.

        Args:
            choices: by unit name; a whole number is a width, a float a ratio of the full one.

        Raises:
            FastslimValueError: for an unknown or missing unit, or a width that is no candidate. Nothing is changed.
        """
        if not self.trace or not isinstance(choices, Mapping):
            raise FastslimTypeError(f"choices must be a dict from unit name to width, got {type(choices).__name__}")
        for name in choices:
            if name not in self._units:
                raise FastslimValueError(f"no unit is called {name!r}; {nearest(str(name), self._units)}")
        widths = {name: self._units[name].as_width(choice) for name, choice in choices.items()}
        missing = [unit.name for unit in self.mutable_units if unit.name not in widths]
        if missing:
            raise FastslimValueError(
                f"choices lack {len(missing)} units, {missing[0]!r} for one; "
                "change a copy of current_choices to keep the others as they are"
            )
        for name, width in widths.items():
            self._units[name].width = width
        self._apply()

    def set_max_choices(self) -> None:
        """Makes the supernet its widest subnet."""
        self.set_choices(self.max_choices)

    def set_min_choices(self) -> None:
        """Makes the supernet its narrowest subnet."""
        self.set_choices(self.min_choices)

    def _apply(self) -> None:
        widths = [unit.width for unit in self._units.values()]
        # The widths fit by construction; nn.Module's attribute machinery would cost more than all the rest.
        specs = self.trace.layers
        for name, layer in self._layers.items():
            spec = specs[name]
            if len(spec.out) == len(spec.inputs) == 1 and not spec.heads:  # prefixes on both sides, as most layers
                unit, channels = spec.out[0]
                if unit is not None:
                    layer.__dict__["active_out"] = channels * widths[unit] // spec.units[unit].channels
            else:
                layer.__dict__.update(spec.state(widths))
        for forward in self._rewritten:
            forward.set_widths(widths)

    def layers_with_specs(self) -> Iterator[tuple[SlimLayer, LayerSpec]]:
        """Every slim layer, and how its channels follow the widths of the units in the order of :attr:`units`."""
        for name, layer in self._layers.items():
            yield layer, self.trace.layers[name]

    def fix_channel_mutables(self) -> None:
        """Leaves the present subnet as the only choice."""
        for unit in self.units:
            unit.fix_chosen()

    def config_template(
        self, only_mutable_units: bool = False, with_unit_init_cfg: bool = False, with_channels: bool = False
    ) -> dict[str, Any]:
        """A config from which the same mutator, with the same present choices, can be built.

        Args:
            only_mutable_units: leave out units that stay at full width.
            with_unit_init_cfg: write every unit's own arguments.
            with_channels: write which layers belong to a unit.

        Returns:
            A dict of plain values.
        """
        units = self.mutable_units if only_mutable_units else self.units
        return dict(
            type=type(self).__name__,
            channel_unit_cfg=dict(
                type=self.unit_class.__name__,
                default_args=dict(self.unit_default_args),
                units={unit.name: unit.config_template(with_unit_init_cfg, with_channels) for unit in units},
            ),
            parse_cfg=dict(self.parse_cfg),
        )

    def state_dict(self) -> dict[str, Any]:
        """The random state and the present choices, of plain numbers, for a resumed run to go on with."""
        version, numbers, gauss = self.rng.getstate()
        return {"random_state": [version, list(numbers), gauss], "choices": self.current_choices}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            FastslimValueError: when it is of another supernet.
        """
        if set(state) != {"random_state", "choices"}:
            raise FastslimValueError(f"a mutator's state holds 'random_state' and 'choices', got {sorted(state)}")
        self.set_choices(state["choices"])
        version, numbers, gauss = state["random_state"]
        self.rng.setstate((version, tuple(numbers), gauss))


def _parse_unit_config(config: Any) -> tuple[type[Unit], dict[str, Any], dict[str, dict[str, Any]]]:
    if not isinstance(config, Mapping):
        config = dict(type=config)
    known = ("type", "default_args", "units")
    for key in config:
        if key not in known:
            raise FastslimValueError(f"channel_unit_cfg has no key {key!r}; {nearest(str(key), known)}")
    if "type" not in config:
        raise FastslimValueError("channel_unit_cfg needs a type, such as 'OneShotMutableChannelUnit'")
    units = {name: dict(unit) for name, unit in config.get("units", {}).items()}
    return unit_type(config["type"]), dict(config.get("default_args", {})), units
