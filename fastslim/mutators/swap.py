"""Put slim layers in the places of a model's torch layers; they hold the very same parameters."""

from __future__ import annotations

from torch import nn

from fastslim.graph import Trace
from fastslim.nn import SlimBatchNorm2d, SlimConv2d, SlimLayer, SlimLinear

SLIM_TYPES: dict[str, type[SlimLayer]] = {"conv": SlimConv2d, "linear": SlimLinear, "bn": SlimBatchNorm2d}


def swap_layers(
    model: nn.Module, trace: Trace, types: dict[str, type[SlimLayer]] | None = None
) -> dict[str, SlimLayer]:
    """Replaces every layer the trace understood, wherever it is held; the model is unchanged when this fails.

    Args:
        model: the traced model.
        trace: its trace.
        types: slim class of "conv", "linear" and "bn".

    Returns:
        The slim layers by module name.
    """
    types = types or SLIM_TYPES
    layers: dict[str, SlimLayer] = {}
    replaced: dict[int, SlimLayer] = {}
    for name, spec in trace.layers.items():
        layer = model.get_submodule(name)
        slim = layer if isinstance(layer, SlimLayer) else types[spec.kind].from_torch(layer)
        layers[name] = replaced[id(layer)] = slim
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if child is not None and id(child) in replaced:
                module._modules[key] = replaced[id(child)]
    return layers
