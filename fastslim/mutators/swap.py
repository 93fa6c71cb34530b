"""Put slim layers, and forwards that follow the widths, in the places of a model's own; all parameters stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fastslim.errors import FastslimValueError, nearest
from fastslim.graph import Trace
from fastslim.graph.rewrite import RewrittenForward
from fastslim.nn import SLIM_CLASSES, SlimLayer, turn_off_fast_paths

# They are replaced at any rate: the slim forms are faster, and the execution plan fuses them.
_ALWAYS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)


def swap_layers(
    model: nn.Module, trace: Trace, types: dict[str, type[SlimLayer]] | None = None
) -> dict[str, SlimLayer]:
    """Replaces every layer the trace understood, wherever it is held; the model is unchanged when this fails.

    Args:
        model: the traced model.
        trace: its trace.
        types: slim classes by kind of layer, where they are not those of `fastslim.nn.SLIM_CLASSES`.

    Returns:
        The slim layers by module name.
    """
    mutable = {i for i, unit in enumerate(trace.units) if unit.mutable}
    layers: dict[str, SlimLayer] = {}
    replaced: dict[int, SlimLayer] = {}
    for name, spec in trace.layers.items():
        layer = model.get_submodule(name)
        if isinstance(layer, SlimLayer):
            layers[name] = layer
            continue
        dims = (*spec.out, *spec.input_dim, *spec.heads, *spec.key, *spec.value)
        if type(layer) not in _ALWAYS and not any(unit in mutable for unit, _ in dims):
            continue
        slim = (types or {}).get(spec.kind, SLIM_CLASSES[type(layer)])
        layers[name] = replaced[id(layer)] = slim.from_torch(layer)
    put_in(model, replaced)
    turn_off_fast_paths(model)
    return layers


def put_in(model: nn.Module, replaced: Mapping[int, nn.Module]) -> None:
    """Puts modules, by the identity of what they replace, wherever that is held."""
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if child is not None and id(child) in replaced:
                module._modules[key] = replaced[id(child)]


def swap_named(
    model: nn.Module, names: Iterable[str], types: Mapping[type[nn.Module], type[SlimLayer]] | None = None
) -> None:
    """Replaces the named layers by slim ones with the same weights, as far as there is one for their class.

    Args:
        model: the model.
        names: of its modules.
        types: slim classes by torch class, where they are not those of `fastslim.nn.SLIM_CLASSES`.

    Raises:
        FastslimValueError: a name that the model does not have.
    """
    modules = dict(model.named_modules())
    replaced: dict[int, nn.Module] = {}
    for name in names:
        if name not in modules:
            raise FastslimValueError(f"the model has no layer {name!r}; {nearest(name, modules)}")
        layer = modules[name]
        slim = {**SLIM_CLASSES, **(types or {})}.get(type(layer))
        if slim is not None and id(layer) not in replaced:
            replaced[id(layer)] = slim.from_torch(layer)
    put_in(model, replaced)
    turn_off_fast_paths(model)


def rewrite_forwards(model: nn.Module, trace: Trace) -> list[RewrittenForward]:
    """Gives every module whose forward narrow widths change one that follows them."""
    rewritten = []
    for name, variants in trace.rewrites.items():
        module = model.get_submodule(name)
        forward: Any = RewrittenForward(module, variants, trace.units)
        module.__dict__["forward"] = forward
        rewritten.append(forward)
    return rewritten
