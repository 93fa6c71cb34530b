"""What is known about a subnet beside its weights, as plain values for JSON."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastslim.errors import FastslimFileError, FastslimTypeError
from fastslim.export.calls import describe
from fastslim.export.weights import listed
from fastslim.graph import count_cost, trace
from fastslim.graph.capture import bind_inputs
from fastslim.mutators import ChannelMutator

FORMAT = "fastslim-subnet-1"


def describe_supernet(mutator: ChannelMutator, widths: Mapping[str, int]) -> dict[str, Any]:
    """Units, costs, inputs and how the supernet was traced.

    Args:
        mutator: of the supernet.
        widths: of all units.
    """
    found = mutator.trace
    mutable = {unit.name for unit in mutator.mutable_units}
    return {
        "units": {
            unit.name: {"width": widths[unit.name], "channels": unit.channels, "mutable": unit.name in mutable}
            for unit in found.units
        },
        "costs": _costs(found, widths),
        "full_costs": _costs(found, {}),
        "inputs": {name: describe(value) for name, value in found.example_inputs.items()},
        "traced": {"include": _patterns(mutator.analyzer.include), "exclude": _patterns(mutator.analyzer.exclude)},
    }


def describe_plain(module: nn.Module, subnet: Mapping[str, Any] | None, example_inputs: Any) -> dict[str, Any]:
    """The same of a network without a mutator, as far as it is known."""
    unknown = {"channels": None, "mutable": True}
    costs: dict[str, int] = {"parameters": sum(parameter.numel() for parameter in module.parameters())}
    inputs: Mapping[str, Any] = {}
    if example_inputs is not None:
        inputs = bind_inputs(module, example_inputs)
        costs = _costs(trace(module, dict(inputs)), {})
    return {
        "units": {name: {"width": _width(name, width), **unknown} for name, width in (subnet or {}).items()},
        "costs": costs,
        "full_costs": None,
        "inputs": {name: describe(value) for name, value in inputs.items()},
        "traced": {"include": [], "exclude": []},
    }


def describe_layers(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Class and sizes of every layer with weights, by name."""
    layers = {}
    for name, layer in module.named_modules():
        if next(layer.parameters(recurse=False), None) is None and next(layer.buffers(recurse=False), None) is None:
            continue
        layers[name] = {
            "type": type(layer).__name__,
            **{key: value for key, value in vars(layer).items() if key in _SIZES and isinstance(value, (int, tuple))},
            "weights": {key: list(value.shape) for key, value in layer.named_parameters(recurse=False)},
        }
    return layers


_SIZES = (
    "in_channels", "out_channels", "groups", "num_features", "in_features", "out_features", "num_channels",
    "num_groups", "normalized_shape", "num_embeddings", "embedding_dim", "embed_dim", "num_heads",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Of what wrote a file."""
    return {
        "fastslim": importlib.metadata.version("fastslim"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def plain_values(value: Any, name: str) -> Any:
    """Metrics or other remarks as JSON can hold them.

    Raises:
        FastslimTypeError: for something else than numbers, strings and containers of them.
    """
    if isinstance(value, Mapping):
        return {str(key): plain_values(entry, f"{name}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Tensor) or type(value).__module__ == "numpy":
        return plain_values(value.tolist(), name)
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)  # JSON has no word for it
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise FastslimTypeError(f"{name} is a {type(value).__name__}; give numbers, strings, lists or dicts of them")


def check_units(path: Path, units: Mapping[str, Mapping[str, Any]], mutator: ChannelMutator) -> None:
    """Raises FastslimFileError when a file's units are not those of a supernet; names what differs."""
    own = {unit.name: unit.channels for unit in mutator.trace.units}
    differences = [f"this network has no unit {name!r}" for name in units if name not in own]
    complete = all(unit["channels"] is not None for unit in units.values())
    needed = own if complete else mutator.current_choices
    differences += [f"the file has no unit {name!r}" for name in needed if name not in units]
    differences += [
        f"unit {name!r} has {unit['channels']} channels in the file, {own[name]} in this network"
        for name, unit in units.items()
        if unit["channels"] not in (None, own.get(name, unit["channels"]))
    ]
    if differences:
        raise FastslimFileError(
            f"{path} holds a subnet of another network: {listed(differences)}. Build the network with the arguments "
            "it had when the subnet was saved"
        )


def _costs(found: Any, widths: Mapping[str, int]) -> dict[str, int]:
    cost = count_cost(found, widths)
    return {"flops": cost.multiply_adds, "parameters": cost.parameters}


def _patterns(given: Any) -> list[str]:
    return [given] if isinstance(given, str) else [str(pattern) for pattern in given]


def _width(name: Any, width: Any) -> int:
    if isinstance(width, bool) or not isinstance(width, int):
        raise FastslimTypeError(
            f"the width of unit {name!r} must be a whole number beside a plain module, got {width!r}"
        )
    return width
