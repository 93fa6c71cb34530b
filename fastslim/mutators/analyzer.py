"""ChannelAnalyzer: what every mutator asks for the channel units of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fastslim.errors import FastslimValueError, nearest
from fastslim.graph import Trace, trace
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
            By unit name ``init_args`` (``num_channels``) and ``channels``: the names of the layers that read the
            unit's channels (``input_related``) and of those that make them (``output_related``).
        """
        found = self.trace(model)
        units = {}
        for index, unit in enumerate(found.units):
            if unit.mutable:
                readers = [name for name, layer in found.layers.items() if index in {u for u, *_ in layer.inputs}]
                channels = dict(input_related=readers, output_related=list(unit.members))
                units[unit.name] = dict(init_args=dict(num_channels=unit.channels), channels=channels)
        return units


def parse_analyzer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A mutator's `parse_cfg` with its defaults.

    Raises:
        FastslimValueError: for an unknown key or type.
    """
    known = dict(type="ChannelAnalyzer", demo_input=DEMO_INPUT, tracer_type="BackwardTracer")
    for key in config:
        if key not in known:
            raise FastslimValueError(f"parse_cfg has no key {key!r}; {nearest(key, known)}")
    parsed = {**known, **config}
    if str(parsed["type"]).rpartition(".")[2] != "ChannelAnalyzer":
        raise FastslimValueError(f"parse_cfg type {parsed['type']!r} is unknown; use 'ChannelAnalyzer'")
    return parsed
