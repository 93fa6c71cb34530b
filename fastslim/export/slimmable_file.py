"""One file that runs at several widths: the full weights, and each subnet's batch-norm vectors (safetensors)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastslim.algorithms.slimmable import SlimmableAlgorithm
from fastslim.errors import FastslimFileError, FastslimTypeError, FastslimValueError
from fastslim.export import description as about
from fastslim.export.new_file import new_file
from fastslim.export.rebuild import prepared
from fastslim.export.sources import at_subnet, uncalibrated
from fastslim.export.switching import VECTORS, SwitchableNetwork
from fastslim.export.weights import load_strictly, read_description, read_tensors, tensors_of, write_tensors
from fastslim.graph.units import active
from fastslim.mutators import mutator_of
from fastslim.nn import IndexedBatchNorm2d, SlimBatchNorm, SwitchableBatchNorm2d

FORMAT = "fastslim-slimmable-1"
Subnets = Mapping[str, Mapping[str, int]] | Sequence[Mapping[str, int]]


@torch.no_grad()
def save_slimmable(
    path: Path | str,
    algo: SlimmableAlgorithm,
    subnets: Subnets,
    *,
    normalisation: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a supernet with several subnets, between which `load_slimmable`'s network switches while it runs.

    Args:
        path: of the file, ending in .safetensors; its metadata hold the JSON description.
        algo: the trained supernet, calibrated for the subnets.
        subnets: a list of subnets, or a dict that names them.
        normalisation: how images are prepared, such as ``dict(mean=[...], std=[...])``.
        metrics: what is known about their quality.
        overwrite: replace a file that is there.

    Returns:
        The path.

    Raises:
        FastslimFileError: something is there already, or the disk refuses.
        FastslimRuntimeError: safetensors is not installed.
        FastslimTypeError: `algo` is no algorithm.
        FastslimValueError: a subnet does not fit, or is not calibrated.
    """
    if not isinstance(algo, SlimmableAlgorithm):
        raise FastslimTypeError(f"save_slimmable takes an AutoSlim or a SlimmableNetwork, got {type(algo).__name__}")
    named = _named(subnets)
    norms = _norm_names(algo)
    weights = {
        name: tensor
        for name, tensor in tensors_of(algo.architecture).items()
        if not any(name.startswith(f"{norm}.") for norm in norms)
    }
    tensors: dict[str, Tensor] = {f"network.{name}": tensor for name, tensor in weights.items()}
    described: dict[str, Any] = {}
    for index, (name, subnet) in enumerate(named.items()):
        with at_subnet(algo, algo.mutator, subnet):
            if uncalibrated(algo):
                raise FastslimValueError(
                    f"subnet {name!r} has only the statistics that all widths share: calibrate it first, "
                    "fastslim.calibrate_batch_norm(algo, loader, subnets=[...])"
                )
            widths = {unit.name: unit.width for unit in algo.mutator.units}
            for norm in (*norms, *_own_forward(algo)):
                for vector, value in _vectors(algo, norm).items():
                    tensors[f"norm.{index}.{norm}.{vector}"] = value
        known = about.describe_supernet(algo.mutator, widths)
        described[name] = {"units": {unit: at["width"] for unit, at in known["units"].items() if at["mutable"]}}
        described[name]["costs"] = known["costs"]
    known["units"] = {name: {**unit, "width": unit["channels"]} for name, unit in known["units"].items()}
    description = {
        "format": FORMAT,
        "network": type(algo.architecture).__name__,
        **{key: known[key] for key in ("units", "full_costs", "inputs", "traced")},
        "subnets": described,
        "norms": norms,
        "own_forward": _own_forward(algo),
        "normalisation": None if normalisation is None else about.plain_values(normalisation, "normalisation"),
        "metrics": about.plain_values(metrics or {}, "metrics"),
        "versions": about.versions(),
    }
    with new_file(path, ".safetensors", overwrite) as place:
        write_tensors(place, tensors, description)
    return Path(path)


def load_slimmable(path: Path | str, architecture: nn.Module, *, example_inputs: Any = None) -> SwitchableNetwork:
    """Reads what `save_slimmable` wrote.

    Args:
        path: of the file.
        architecture: the plain full-size network, freshly built; it becomes part of the result.
        example_inputs: what it is called with, where the file cannot say it.

    Returns:
        The network in evaluation mode, at the subnet that was listed last; ``set_width`` switches.

    Raises:
        FastslimFileError: the file is missing, damaged, of another kind, or that of another network; names what
            differs.
        FastslimTypeError: `architecture` is no plain network.
    """
    path = Path(path)
    if not isinstance(architecture, nn.Module) or isinstance(architecture, SlimmableAlgorithm):
        raise FastslimTypeError(
            f"architecture must be the plain network, freshly built, got {type(architecture).__name__}"
        )
    if mutator_of(architecture) is not None:
        raise FastslimTypeError("architecture is converted already: build the plain network anew")
    description = read_description(path)
    if description.get("format") != FORMAT:
        raise FastslimFileError(
            f"{path} is no slimmable network: its format is {description.get('format')!r}, not {FORMAT!r}"
        )
    tensors = read_tensors(path)
    mutator = prepared(architecture, description, example_inputs, path)
    about.check_units(path, description["units"], mutator)
    subnets = {name: subnet["units"] for name, subnet in description["subnets"].items()}
    sets = {
        norm: [{v: tensors.get(f"norm.{index}.{norm}.{v}") for v in VECTORS} for index in range(len(subnets))]
        for norm in (*description["norms"], *description["own_forward"])
    }
    weights = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith("network.")}
    network = SwitchableNetwork(mutator, subnets, sets, description)
    present = {name: tensor for name, tensor in network.network.state_dict().items() if _of_norm(name, description)}
    load_strictly(network.network, {**weights, **present}, path)
    return network


def _of_norm(name: str, description: Mapping[str, Any]) -> bool:
    return any(name.startswith(f"{norm}.") for norm in description["norms"])


def _named(subnets: Subnets) -> dict[str, Mapping[str, int]]:
    named = dict(subnets) if isinstance(subnets, Mapping) else {str(i): subnet for i, subnet in enumerate(subnets)}
    if not named or not all(isinstance(subnet, Mapping) for subnet in named.values()):
        raise FastslimTypeError(
            "subnets must be a list of subnets, or a dict of them by name; a subnet is a dict from unit name to width"
        )
    return named


def _norm_names(algo: SlimmableAlgorithm) -> list[str]:
    """The network's slim batch norms; not the sets inside them."""
    layers = {name: layer for name, layer in algo.architecture.named_modules() if isinstance(layer, SlimBatchNorm)}
    switched = [n for n, layer in layers.items() if isinstance(layer, (SwitchableBatchNorm2d, IndexedBatchNorm2d))]
    return [name for name in layers if not any(name.startswith(f"{outer}.") for outer in switched)]


def _own_forward(algo: SlimmableAlgorithm) -> list[str]:
    """Batch norms with a forward of their own, which has been rewritten."""
    return [
        name
        for name, layer in algo.slim_batch_norms().items()
        if not isinstance(layer, SlimBatchNorm) and layer.running_mean is not None
    ]


def _vectors(algo: SlimmableAlgorithm, name: str) -> dict[str, Tensor]:
    """What a batch norm normalises with at the present subnet."""
    layer: Any = algo.architecture.get_submodule(name)
    if isinstance(layer, SlimBatchNorm):
        spec = algo.mutator.trace.layers[name]
        widths = [unit.width for unit in algo.mutator.units]
        plain = layer.to_torch(active(spec.input_dim, widths, spec.units)[0])
        return {v: getattr(plain, v).detach() for v in VECTORS if getattr(plain, v) is not None}
    names = ("running_mean", "running_var")
    if layer.__dict__.get("calibrated") is not None:
        return dict(zip(names, layer.calibrated, strict=True))
    index = algo.mutator.trace.index_of(f"{name}.running_mean", algo.mutator.current_choices)[0]
    return {v: getattr(layer, v) if index is None else getattr(layer, v)[index] for v in names}
