"""Tensors in safetensors files: shared ones once, checked by their digest, no code ever executed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastslim.errors import FastslimFileError, FastslimTypeError
from fastslim.export.packages import need

# Where a file holds what belongs to its tensors, as JSON.
_KEY = "fastslim"


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """A state_dict with nothing but tensors.

    Raises:
        FastslimTypeError: a module keeps something else in it.
    """
    state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise FastslimTypeError(
                f"{name} in the state_dict is a {type(value).__name__}; only tensors can be saved without pickle"
            )
    return state


def write_tensors(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Writes a file; tensors that are the same memory under several names are written once.

    Args:
        path: of the new file.
        tensors: on any device.
        description: plain values, kept in the file's metadata.
    """
    save = need("safetensors.torch", "writing weights").save_file
    first: dict[Any, str] = {}
    kept: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        same = first.setdefault((*place, tensor.dtype), name) if tensor.numel() else name
        if same != name:
            shared[name] = same
        else:
            kept[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    metadata = {**description, "shared": shared, "digest": _digest(kept)}
    save(kept, path, {"format": "pt", _KEY: json.dumps(metadata, allow_nan=False)})
    # Safetensors lets nobody but the owner read it; the folder is as open as new files are meant to be.
    path.chmod(path.parent.stat().st_mode & 0o666)


def read_description(path: Path) -> dict[str, Any]:
    """What `write_tensors` was told beside the tensors.

    Raises:
        FastslimFileError: the file is missing, damaged, or has another origin.
    """
    package = need("safetensors", "reading weights")
    try:
        with package.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError as error:
        raise FastslimFileError(f"there is no file {path}") from error
    except (OSError, ValueError, package.SafetensorError) as error:
        raise FastslimFileError(f"{path} is damaged, or no safetensors file ({error}): save it again") from error
    try:
        found = json.loads(metadata[_KEY])
    except (KeyError, ValueError) as error:
        raise FastslimFileError(f"{path} was not written by fastslim: its metadata hold {sorted(metadata)}") from error
    assert isinstance(found, dict)
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors by name, on the CPU.

    Raises:
        FastslimFileError: the file is missing, damaged, or has another origin.
    """
    description = read_description(path)
    package = need("safetensors.torch", "reading weights")
    try:
        tensors: dict[str, Tensor] = package.load_file(path)
    except (OSError, ValueError, need("safetensors", "reading weights").SafetensorError) as error:
        raise FastslimFileError(f"{path} is damaged ({error}): save it again") from error
    if _digest(tensors) != description.get("digest"):
        raise FastslimFileError(f"{path} is damaged: its weights are not those that were written; save it again")
    tensors.update({name: tensors[same] for name, same in description["shared"].items()})
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Safetensors notices a file that is cut short, but no changed byte in the weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copies tensors into a network of exactly their names and shapes, which takes over their dtypes.

    Raises:
        FastslimFileError: names or shapes differ; the network is left as it was.
    """
    own = module.state_dict()
    differences = [f"it lacks {name}" for name in own if name not in tensors]
    differences += [f"its {name} has no place in the network" for name in tensors if name not in own]
    differences += [
        f"its {name} has shape {tuple(tensors[name].shape)}, the network's {tuple(own[name].shape)}"
        for name in own
        if name in tensors and own[name].shape != tensors[name].shape
    ]
    if differences:
        raise FastslimFileError(
            f"{path} holds the weights of another network: {listed(differences)}. Build the network as it was when "
            "the file was written"
        )
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        if name in own:
            tensor.data = tensor.data.to(tensors[name].dtype)
    module.load_state_dict(dict(tensors))


def listed(differences: list[str]) -> str:
    """The first of many differences, and how many there are."""
    return "; ".join(differences[:3]) + (f"; {len(differences)} differences in all" if len(differences) > 3 else "")
