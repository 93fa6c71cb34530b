"""ChannelAnalyzer: what every mutator asks for the channel units of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastslim.errors import FastslimTypeError, FastslimValueError, nearest
from fastslim.graph import Trace, trace
from fastslim.mutators.channel import related_channels
from fastslim.registry import MODELS

DEMO_INPUT = (1, 3, 224, 224)


@MODELS.register_module()
class ChannelAnalyzer:
    """Finds the channel units of a model by following its channels through one forward.

    Args:
        demo_input: what the model is called with: a tensor, a tuple, a dict of keyword arguments, the shape of one
            image batch, or ``dict(type="DefaultDemoInput", input_shape=...)``.
        tracer_type: taken for compatibility; there is one way of tracing.
        include: names or patterns of modules whose output channels may change; all, when empty.
        exclude: names or patterns of modules whose output channels stay full.
    """

    def __init__(
        self,
        demo_input: Any = DEMO_INPUT,
        tracer_type: str = "BackwardTracer",
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        if isinstance(demo_input, Mapping) and "input_shape" in demo_input:
            demo_input = demo_input["input_shape"]
        self.demo_input = tuple(demo_input) if isinstance(demo_input, (list, tuple)) else demo_input
        self.tracer_type, self.include, self.exclude = tracer_type, include, exclude

    def trace(self, model: nn.Module) -> Trace:
        """Units, layers and findings, see `fastslim.graph.trace`."""
        return trace(model, self.demo_input, self.exclude, self.include)

    def analyze(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """The units that may change, as plain values.

        Args:
            model: any module; it is left as it was.

        Returns:
            By unit name ``init_args`` (``num_channels``) and ``channels``: which channels of which layers read the
            unit's channels (``input_related``) and make them (``output_related``), as ``name``, ``start``, ``end`` and
            ``is_output_channel``.
        """
        found = self.trace(model)
        units = {}
        for unit, (inputs, outputs) in zip(found.units, related_channels(found), strict=True):
            if unit.mutable:
                channels = dict(
                    input_related=[channel.config_template() for channel in inputs],
                    output_related=[channel.config_template() for channel in outputs],
                )
                units[unit.name] = dict(init_args=dict(num_channels=unit.channels), channels=channels)
        return units


# MMRazor's first configs named the tracer itself; what else it was told has no counterpart here.
_TRACERS = ("BackwardTracer", "FxTracer")
_KINDS = ("ChannelAnalyzer", "Config", "Predefined", *_TRACERS)


def written(demo_input: Any) -> Any:
    """A demo input as a config can hold it: of a tensor the shape."""
    return tuple(demo_input.shape) if isinstance(demo_input, Tensor) else demo_input


def parse_analyzer_config(config: Any) -> dict[str, Any]:
    """A mutator's `parse_cfg` with its defaults.

    Raises:
        FastslimTypeError: when it is no dict and no `ChannelAnalyzer`.
        FastslimValueError: for an unknown key or type.
    """
    if isinstance(config, ChannelAnalyzer):
        return dict(type="ChannelAnalyzer", demo_input=written(config.demo_input), tracer_type=config.tracer_type)
    if not isinstance(config, Mapping):
        raise FastslimTypeError(f"parse_cfg must be a dict or a ChannelAnalyzer, got {type(config).__name__}")
    kind = str(config.get("type", "ChannelAnalyzer")).rpartition(".")[2]
    if kind not in _KINDS:
        raise FastslimValueError(
            f"parse_cfg type {config['type']!r} is unknown; {nearest(kind, _KINDS)}: use 'ChannelAnalyzer'"
        )
    known = dict(type="ChannelAnalyzer", demo_input=DEMO_INPUT, tracer_type="BackwardTracer")
    ignored = ("_scope_", "from_cfg", *(("loss_calculator",) if kind in _TRACERS else ()))
    for key in config:
        if key not in known and key not in ignored:
            raise FastslimValueError(f"parse_cfg has no key {key!r}; {nearest(str(key), known)}")
    given = {key: value for key, value in config.items() if key in known or key == "from_cfg"}
    if kind in _TRACERS:
        given.update(type="ChannelAnalyzer", tracer_type=kind)
    return {**known, **given}
