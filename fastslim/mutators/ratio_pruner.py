"""RatioPruner: MMRazor 0.x's way to choose, hand out and deploy subnets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastslim.errors import FastslimTypeError, FastslimValueError, nearest
from fastslim.mutators.choices import Choices
from fastslim.mutators.fix_subnet import deploy
from fastslim.mutators.one_shot import OneShotChannelMutator
from fastslim.mutators.one_shot_units import OneShotMutableChannelUnit
from fastslim.mutators.unit_configs import read_config
from fastslim.nn import IndexedBatchNorm2d, SlimBatchNorm2d
from fastslim.registry import MODELS

ChannelConfig = dict[str, dict[str, int]]
_BATCH_NORMS = (nn.BatchNorm2d, SlimBatchNorm2d)


@MODELS.register_module()
class RatioChannelUnit(OneShotMutableChannelUnit):
    """A one-shot unit whose ratios mean ``round(n * ratio)`` of n channels, and at least one."""

    def _channels_at(self, num_channels: int, ratio: float) -> int:
        return max(1, round(num_channels * ratio))


@MODELS.register_module()
class RatioPruner(OneShotChannelMutator):
    """A one-shot mutator whose units take the first ``round(n * ratio)`` of n channels.

    A *space* of MMRazor 0.x is a channel unit here, its `space_id` the unit's name, and a subnet a dict from space to
    width. A *channel_cfg* names the channels of every layer.

    Args:
        ratios: parts of the full width to choose from.
        except_start_keys: the outputs of modules whose names start with one of these stay at full width; names that
            no module has are ignored, as in MMRazor.
        **kwargs: as for `OneShotChannelMutator`.

    Attributes:
        ratios: ascending.
        channel_bins: how many there are.
        min_ratio: the smallest.
    """

    def __init__(
        self, ratios: Sequence[float], except_start_keys: Sequence[str] | None = ("head.fc",), **kwargs: Any
    ) -> None:
        if isinstance(ratios, (str, Mapping)) or not isinstance(ratios, Sequence):
            raise FastslimTypeError(f"ratios must be a list of numbers, got {type(ratios).__name__}")
        if not ratios:
            raise FastslimValueError("ratios is empty; list at least one, such as 1.0")
        if isinstance(except_start_keys, str):
            raise FastslimTypeError(f"except_start_keys must be a list of names, got {except_start_keys!r}")
        arguments = dict(candidate_choices=list(ratios), choice_mode="ratio", divisor=1, min_ratio=0.0)
        super().__init__(dict(type="RatioChannelUnit", default_args=arguments), **kwargs)
        self.ratios = sorted(ratios)
        self.channel_bins, self.min_ratio = len(self.ratios), self.ratios[0]
        self.except_start_keys = tuple(except_start_keys or ())

    def prepare_from_supernet(self, supernet: nn.Module) -> None:
        """As `OneShotChannelMutator.prepare_from_supernet`.

        Args:
            supernet: a network, or an algorithm that has one as its `architecture`.
        """
        network = _network(supernet)
        spared = [name for name, _ in network.named_modules() if name and name.startswith(self.except_start_keys)]
        self.analyzer.exclude = (*self.analyzer.exclude, *spared)
        super().prepare_from_supernet(network)

    def config_template(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As for `OneShotChannelMutator`, from which the same units with the same choices can be built."""
        template = super().config_template(*args, **kwargs)
        units = template["channel_unit_cfg"]["units"]
        for unit in self.units:
            if not unit.spec.mutable:
                units.pop(unit.name, None)
        # Units that except_start_keys spared are told apart by not being listed.
        return {**template, "type": "OneShotChannelMutator", "parse_cfg": {**template["parse_cfg"], "from_cfg": True}}

    @property
    def search_spaces(self) -> dict[str, int]:
        """How many widths every space may take."""
        return {unit.name: len(unit.candidate_widths) for unit in self.mutable_units}

    @property
    def channel_spaces(self) -> dict[str, int]:
        """How many channels every space has."""
        return {unit.name: unit.num_channels for unit in self.mutable_units}

    def get_space_id(self, module_name: str) -> str | dict[str, list[str | None]] | None:
        """The space of a layer's output channels.

        Returns:
            None where they cannot change; ``{"concat": [...]}`` where several spaces stand side by side.

        Raises:
            FastslimValueError: for a name of no layer.
        """
        layer = self.trace.layers.get(module_name)
        if layer is None:
            raise FastslimValueError(f"no layer is called {module_name!r}; {nearest(module_name, self.trace.layers)}")
        names = [None if unit is None else self.units[unit].name for unit, _ in layer.out]
        known = [name if name in self.search_spaces else None for name in names]
        return known[0] if len(known) == 1 else {"concat": known} if any(known) else None

    def sample_subnet(self) -> Choices:
        """Random widths, by space."""
        return self.sample_choices("random")

    def set_subnet(self, subnet: Mapping[str, Any]) -> None:
        """Runs at these widths (or ratios) from now on."""
        self.set_choices(subnet)

    def set_max_channel(self) -> None:
        """Runs at full width from now on."""
        self.set_max_choices()

    def set_min_channel(self) -> None:
        """Runs at the smallest ratio from now on."""
        self.set_min_choices()

    def get_max_channel_bins(self, max_channel_bins: int | None = None) -> dict[str, int]:
        """The full width of every space, in bins.

        Args:
            max_channel_bins: bins of a space; one per ratio by default.
        """
        return dict.fromkeys(self.channel_spaces, max_channel_bins or self.channel_bins)

    def set_channel_bins(self, channel_bins: Mapping[str, Any], max_channel_bins: int | None = None) -> None:
        """Runs each space with some of its bins from now on, at the ratio that is nearest.

        Args:
            channel_bins: how many bins by space, or masks of them.
            max_channel_bins: bins of a space. By default there is one per ratio, and the k-th ratio is meant.

        Raises:
            FastslimValueError: for an unknown space, or none or too many bins.
        """
        bins = max_channel_bins or self.channel_bins
        widths = {}
        for name, asked in channel_bins.items():
            if name not in self.name2unit:
                raise FastslimValueError(f"no space is called {name!r}; {nearest(name, self.channel_spaces)}")
            count = int(sum(asked)) if isinstance(asked, (Tensor, list, tuple)) else asked
            if not isinstance(count, int) or not 0 < count <= bins:
                raise FastslimValueError(f"space {name!r} cannot take {asked!r} bins; choose 1 to {bins}")
            ratio = self.ratios[count - 1] if max_channel_bins is None else count / bins
            widths[name] = self.name2unit[name].nearest_width(ratio)
        self.set_choices(widths)

    def export_subnet(self) -> ChannelConfig:
        """The present subnet as a channel_cfg.

        Returns:
            By layer ``out_channels`` and ``raw_out_channels`` (at full width), and for all but normalisation layers
            ``in_channels`` and ``raw_in_channels``: plain numbers.
        """
        widths = {unit.name: unit.width for unit in self.units}
        config: ChannelConfig = {}
        for name, layer in self.trace.layers.items():
            config[name] = {}
            if not layer.kind.endswith(("bn", "norm")):
                config[name]["in_channels"] = layer.in_width(widths)
                config[name]["raw_in_channels"] = layer.in_width({})
            config[name]["out_channels"] = layer.out_width(widths)
            config[name]["raw_out_channels"] = layer.out_width({})
        return config

    def choices_of(self, channel_cfg: Mapping[str, Any] | str | Path) -> Choices:
        """The widths that a channel_cfg means, be they among the ratios or not.

        Args:
            channel_cfg: as `export_subnet` makes it, or widths by space; a dict, or a JSON or YAML file with one.

        Raises:
            FastslimValueError: it is of another network, contradicts itself, or has widths the layers cannot have.
            FastslimFileError: the file cannot be read.
        """
        config = read_config(channel_cfg, "channel_cfg") if isinstance(channel_cfg, (str, Path)) else channel_cfg
        if not isinstance(config, Mapping):
            raise FastslimTypeError(f"channel_cfg must be a dict from layer to channels, got {type(config).__name__}")
        if not any(isinstance(channels, Mapping) for channels in config.values()):
            return self._widths_of_spaces(config)
        choices: Choices = {}
        for name, channels in config.items():
            space = self.get_space_id(name)
            if not isinstance(channels, Mapping) or "out_channels" not in channels:
                raise FastslimValueError(f"channel_cfg of layer {name!r} must be a dict with 'out_channels'")
            full = self.trace.layers[name].out_width({})
            if channels.get("raw_out_channels", full) != full:
                raise FastslimValueError(
                    f"channel_cfg is of another network: layer {name!r} has {full} output channels, not "
                    f"{channels['raw_out_channels']}"
                )
            if not isinstance(space, str):
                continue
            unit = self.name2unit[space]
            width = unit.check_width(int(channels["out_channels"]) * unit.num_channels // full)
            if choices.setdefault(space, width) != width:
                raise FastslimValueError(
                    f"channel_cfg gives {width} and {choices[space]} channels to layers that must have as many: "
                    f"{name!r} belongs to space {space!r}"
                )
        lacking = [name for name in self.search_spaces if name not in choices]
        if lacking:
            raise FastslimValueError(f"channel_cfg says nothing of space {lacking[0]!r}; it needs every layer")
        return choices

    def switch_subnet(self, channel_cfg: Mapping[str, Any] | str | Path, subnet_ind: int | None = None) -> None:
        """Runs a subnet from now on.

        Args:
            channel_cfg: see `choices_of`.
            subnet_ind: its number, for batch norms that `convert_switchable_bn` gave a set for each subnet.
        """
        self._set_widths(self.choices_of(channel_cfg))
        if subnet_ind is not None:
            for module in self.trace.model.modules():
                if isinstance(module, IndexedBatchNorm2d):
                    module.select(subnet_ind)

    def convert_switchable_bn(self, module: nn.Module, num_bns: int) -> nn.Module:
        """Gives every `BatchNorm2d` of a network a set of parameters and statistics for each of `num_bns` subnets.

        To be called before `prepare_from_supernet`. The first set is the layer's own, the others are copies.

        Returns:
            The module, or what takes its place if it is a batch norm itself.
        """
        if type(module) in _BATCH_NORMS:
            return _with_sets(module, num_bns)
        for parent in list(module.modules()):
            for key, child in parent._modules.items():
                if child is not None and type(child) in _BATCH_NORMS:
                    parent._modules[key] = _with_sets(child, num_bns)
        return module

    def deploy_subnet(self, supernet: nn.Module, channel_cfg: Mapping[str, Any] | str | Path) -> nn.Module:
        """Makes a network a plain one of a subnet's size, in place, with the weights the subnet uses.

        Args:
            supernet: the network this pruner was prepared with, or one it is prepared with now.
            channel_cfg: see `choices_of`.

        Returns:
            The network. This pruner has only that one subnet left.
        """
        network = _network(supernet)
        if self._supernet is None:
            self.prepare_from_supernet(network)
        if not self.is_prepared_for(network):
            raise FastslimValueError("this pruner was prepared with another supernet; deploy that one")
        self._set_widths(self.choices_of(channel_cfg))
        return deploy(self)

    def _widths_of_spaces(self, widths: Mapping[str, Any]) -> Choices:
        for name in widths:
            if name not in self.search_spaces:
                raise FastslimValueError(f"no space is called {name!r}; {nearest(str(name), self.search_spaces)}")
        lacking = [name for name in self.search_spaces if name not in widths]
        if lacking:
            raise FastslimValueError(f"channel_cfg says nothing of space {lacking[0]!r}; it needs every one")
        units = self.name2unit
        return {
            name: units[name].check_width(width) if isinstance(width, int) else units[name].as_width(width)
            for name, width in widths.items()
        }

    def _set_widths(self, widths: Choices) -> None:
        for name, width in widths.items():
            self.name2unit[name].width = width
        self._apply()


def _network(supernet: nn.Module) -> nn.Module:
    """The network of an algorithm, or what is one itself."""
    inner = getattr(supernet, "architecture", None)
    return inner if isinstance(inner, nn.Module) else supernet


def _with_sets(bn: nn.Module, num_bns: int) -> IndexedBatchNorm2d:
    plain = bn.to_torch() if isinstance(bn, SlimBatchNorm2d) else bn
    indexed = IndexedBatchNorm2d.from_torch(plain)
    indexed.init_sets(num_bns)
    return indexed
