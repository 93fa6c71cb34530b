"""How convolutions, linear and batch-norm layers carry channels, and which of them can be slimmed."""

from __future__ import annotations

import math

from torch import fx, nn
from torch.nn.utils import parametrize

from fastslim.graph.propagate import Channels, Known, NotUnderstoodError, Propagation, shape_of
from fastslim.graph.units import Part, Parts, scaled
from fastslim.nn import SlimBatchNorm2d, SlimConv2d, SlimLinear

KINDS: dict[type[nn.Module], str] = {
    nn.Conv2d: "conv",
    nn.Linear: "linear",
    nn.BatchNorm2d: "bn",
    SlimConv2d: "conv",
    SlimLinear: "linear",
    SlimBatchNorm2d: "bn",
}


def check_slimmable(p: Propagation, module: nn.Module) -> None:
    """Raises NotUnderstoodError when a layer must be left exactly as it is."""
    if parametrize.is_parametrized(module):
        raise NotUnderstoodError("has parametrizations")
    if type(module) not in KINDS:
        raise NotUnderstoodError(f"is a subclass of {type(module).__mro__[1].__name__} and may compute differently")
    if module._parameters.get("weight") is None and not isinstance(module, nn.BatchNorm2d):
        raise NotUnderstoodError("computes its weight in a hook")
    if any(id(parameter) in p.shared for parameter in module.parameters()):
        raise NotUnderstoodError("shares its parameters with other modules or uses in forward")


def conv(p: Propagation, node: fx.Node) -> Known:
    """Dense: a new unit. Grouped and depthwise: output channels follow the input's."""
    module = p.module(node)
    check_slimmable(p, module)
    assert isinstance(module, nn.Conv2d)
    x = _input(p, node, channel_dim=1, ndim=4)
    out_channels, groups = module.out_channels, module.groups
    if groups == 1:
        return p.layer(node, "conv", 1, x, lambda _: (p.units.new(str(node.target), out_channels),))
    if groups == module.in_channels:
        return p.layer(node, "conv", 1, x, lambda parts: scaled(parts, out_channels // groups))
    if x is None:
        return p.layer(node, "conv", 1, x, lambda _: (Part(None, out_channels),))
    if len(x) > 1:
        raise NotUnderstoodError("is a grouped convolution of concatenated channels")
    unit = x[0].unit
    if unit is not None:
        unit = p.units.find(unit)
        # A width gives in_channels * width / unit.channels inputs; they must be whole groups.
        per_group = module.in_channels // groups
        p.units.need_multiple(
            unit, per_group * p.units.channels[unit] // math.gcd(per_group * p.units.channels[unit], module.in_channels)
        )
    return p.layer(node, "conv", 1, x, lambda _: (Part(unit, out_channels),))


def linear(p: Propagation, node: fx.Node) -> Known:
    """A new unit, when the last dimension holds the channels; else channels pass by."""
    module = p.module(node)
    check_slimmable(p, module)
    assert isinstance(module, nn.Linear)
    last = len(shape_of(node)) - 1
    x = p.channels(node.args[0])
    if x is not None and x.dim != last:
        return x
    return p.layer(
        node, "linear", last, x.parts if x else None, lambda _: (p.units.new(str(node.target), module.out_features),)
    )


def batch_norm(p: Propagation, node: fx.Node) -> Known:
    """Channels pass through."""
    check_slimmable(p, p.module(node))
    return p.layer(node, "bn", 1, _input(p, node, channel_dim=1, ndim=4), lambda parts: parts)


def _input(p: Propagation, node: fx.Node, channel_dim: int, ndim: int) -> Parts | None:
    if len(shape_of(node.args[0])) != ndim:
        raise NotUnderstoodError(f"gets a tensor of {len(shape_of(node.args[0]))} dimensions instead of {ndim}")
    x: Channels | None = p.channels(node.args[0])
    if x is not None and x.dim != channel_dim:
        raise NotUnderstoodError(f"mixes the channels of dimension {x.dim} with others")
    return x.parts if x is not None else None
