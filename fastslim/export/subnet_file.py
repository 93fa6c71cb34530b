"""A subnet in a folder: its weights (safetensors), and what is known about it (JSON)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

from torch import Tensor, nn

from fastslim.algorithms.slimmable import SlimmableAlgorithm
from fastslim.errors import FastslimFileError, FastslimTypeError, FastslimValueError
from fastslim.export import description as about
from fastslim.export.new_file import new_file, new_folder, refuse_existing, replace_text
from fastslim.export.rebuild import rebuild
from fastslim.export.sources import at_subnet, find_mutator
from fastslim.export.subnet import export_subnet
from fastslim.export.weights import read_tensors, tensors_of, write_tensors
from fastslim.mutators import ChannelMutator

DESCRIPTION = "subnet.json"
# An overwritten subnet's new weights lie beside the old ones until the description names them.
WEIGHTS = ("weights.safetensors", "weights-2.safetensors")


class SavedSubnet(dict[str, int]):
    """The width of every mutable unit, as ``algo.set_subnet`` takes it, and what else a file says about a subnet.

    Attributes:
        path: the folder.
        description: all of its JSON.
    """

    def __init__(self, path: Path, description: dict[str, Any]) -> None:
        units = description["units"].items()
        super().__init__({name: unit["width"] for name, unit in units if unit["mutable"]})
        self.path, self.description = path, description

    @property
    def costs(self) -> dict[str, int]:
        """Multiply-adds of one sample ("flops") and "parameters"."""
        return dict(self.description["costs"])

    @property
    def metrics(self) -> dict[str, Any]:
        """As they were given to `save_subnet`."""
        return dict(self.description["metrics"])

    @property
    def normalisation(self) -> dict[str, Any] | None:
        """As it was given to `save_subnet`."""
        found: dict[str, Any] | None = self.description["normalisation"]
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """The weights, on the CPU.

        Raises:
            FastslimFileError: their file is missing or damaged.
        """
        return read_tensors(self.path / self.description["weights"])


def save_subnet(
    path: Path | str,
    source: SlimmableAlgorithm | ChannelMutator | nn.Module,
    subnet: Mapping[str, Any] | None = None,
    *,
    module: nn.Module | None = None,
    example_inputs: Any = None,
    normalisation: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> SavedSubnet:
    """Writes a subnet into a folder: `weights.safetensors` and `subnet.json`.

    Whatever interrupts it, the folder holds the complete old or the complete new subnet.

    Args:
        path: of the folder.
        source: an AutoSlim, a mutator, a converted model, or a plain network such as `export_subnet` returns.
        subnet: width by unit name; the present one of the source when None. With a plain network the units it was
            exported at, for the file to fit its supernet.
        module: the plain network whose weights are written, if it was trained further since it was exported.
        example_inputs: what a plain network is called with; the file then holds its costs and input shapes.
        normalisation: how images are prepared, such as ``dict(mean=[...], std=[...])``.
        metrics: what is known about its quality.
        overwrite: replace a subnet that is there.

    Returns:
        What `load_subnet` of the folder returns.

    Raises:
        FastslimFileError: something is there already, or the disk refuses.
        FastslimRuntimeError: safetensors is not installed.
        FastslimValueError: the subnet does not fit the source, or the module not the subnet.
    """
    path = Path(path)
    if path.exists():
        refuse_existing(path, overwrite)
        _read_json(path)  # only a subnet is replaced
    mutator = find_mutator(source)
    if mutator is None and not isinstance(source, nn.Module):
        raise FastslimTypeError(
            "save_subnet takes an AutoSlim, a mutator, a converted model or a plain network, "
            f"got {type(source).__name__}"
        )
    if mutator is not None:
        with at_subnet(source, mutator, subnet):
            known = about.describe_supernet(mutator, {unit.name: unit.width for unit in mutator.units})
            plain = export_subnet(source)
        if module is not None:
            _check_size(module, plain)
            plain = module
    else:
        assert isinstance(source, nn.Module)
        plain = source if module is None else module
        known = about.describe_plain(plain, subnet, example_inputs)
    description = {
        "format": about.FORMAT,
        "network": type(plain).__name__,
        **known,
        "layers": about.describe_layers(plain),
        "normalisation": None if normalisation is None else about.plain_values(normalisation, "normalisation"),
        "metrics": about.plain_values(metrics or {}, "metrics"),
        "versions": about.versions(),
    }
    _write(path, plain, description)
    return SavedSubnet(path, description)


@overload
def load_subnet(path: Path | str, model: None = None, *, example_inputs: Any = None) -> SavedSubnet: ...
@overload
def load_subnet(path: Path | str, model: Any, *, example_inputs: Any = None) -> nn.Module: ...


def load_subnet(path: Path | str, model: Any = None, *, example_inputs: Any = None) -> SavedSubnet | nn.Module:
    """Reads what `save_subnet` wrote.

    Args:
        path: of the folder.
        model: a supernet (an algorithm, a mutator or a converted model) or the plain full-size network it was made
            of, freshly built or not: its weights do not matter, and it stays as it is. Or a plain network of exactly
            the subnet's size.
        example_inputs: what a plain full-size network is called with, where the file cannot say it.

    Returns:
        Without a model the subnet's choices, ``algo.set_subnet(load_subnet(path))``; with one the plain network, in
        evaluation mode, with the weights of the file.

    Raises:
        FastslimFileError: there is no subnet, it is damaged, or it is that of another network; names what differs.
    """
    path = Path(path)
    saved = SavedSubnet(path, _read_json(path))
    if model is None:
        return saved
    return rebuild(path, saved.description, saved, saved.state_dict(), model, example_inputs)


def _check_size(module: nn.Module, exported: nn.Module) -> None:
    sizes = {name: tuple(tensor.shape) for name, tensor in exported.state_dict().items()}
    for name, tensor in tensors_of(module).items():
        if sizes.get(name, tuple(tensor.shape)) != tuple(tensor.shape):
            raise FastslimValueError(
                f"{name} of the module has shape {tuple(tensor.shape)}, at this subnet it is {sizes[name]}: give the "
                "subnet that the module was exported at"
            )


def _write(path: Path, plain: nn.Module, description: dict[str, Any]) -> None:
    tensors = tensors_of(plain)
    if not path.exists():
        description["weights"] = WEIGHTS[0]
        with new_folder(path) as folder:
            write_tensors(folder / WEIGHTS[0], tensors, {"format": about.FORMAT})
            (folder / DESCRIPTION).write_text(_as_text(description), encoding="utf-8")
        return
    old = _read_json(path)["weights"]
    description["weights"] = WEIGHTS[old == WEIGHTS[0]]
    with new_file(path / description["weights"], ".safetensors", overwrite=True) as place:
        write_tensors(place, tensors, {"format": about.FORMAT})
    replace_text(path / DESCRIPTION, _as_text(description))
    (path / old).unlink(missing_ok=True)


def _as_text(description: Mapping[str, Any]) -> str:
    return json.dumps(description, indent=1, allow_nan=False) + "\n"


def _are_units(units: Any) -> bool:
    return isinstance(units, dict) and all(
        isinstance(unit, dict) and {"width", "channels", "mutable"} <= set(unit) and isinstance(unit["width"], int)
        for unit in units.values()
    )


_ENTRIES = ("units", "costs", "inputs", "traced", "layers", "normalisation", "metrics", "weights")


def _read_json(path: Path) -> dict[str, Any]:
    file = path / DESCRIPTION
    if not path.exists():
        raise FastslimFileError(f"there is no subnet {path}")
    if not file.is_file():
        raise FastslimFileError(f"{path} is not a subnet: fastslim.save_subnet writes a folder with {DESCRIPTION}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FastslimFileError(f"{file} is damaged ({error}): save the subnet again") from error
    kind = found.get("format") if isinstance(found, dict) else None
    if kind != about.FORMAT:
        raise FastslimFileError(
            f"{file} is not the description of a subnet: its format is {kind!r}, not {about.FORMAT!r}"
        )
    missing = [entry for entry in _ENTRIES if entry not in found]
    if not missing and not _are_units(found["units"]):
        missing = ["the units' widths"]
    if missing or found["weights"] not in WEIGHTS:
        raise FastslimFileError(
            f"{file} is damaged: it lacks {missing or ['a name of weights']}; save the subnet again"
        )
    assert isinstance(found, dict)
    return found
