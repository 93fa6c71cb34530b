"""Checkpoints: atomic on disk, plain data inside (no pickle is executed), and checked before they are used."""

from __future__ import annotations

import pickle
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastslim.errors import FastslimFileError
from fastslim.files import replace_file

FORMAT = "fastslim-checkpoint-1"
ARCHIVE = b"PK\x03\x04"  # torch.save writes a zip file
ENTRIES = ("model", "epoch", "step", "config")


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Writes ``state``; the old file stays whole until the new one is.

    Args:
        path: of the file.
        state: tensors, numbers, strings and containers of them; at least ``model``, ``epoch``, ``step``, ``config``.

    Raises:
        FastslimFileError: the folder or the disk refuses.
    """
    replace_file(path, lambda stream: torch.save({"format": FORMAT, **state}, stream))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote, on the CPU.

    Raises:
        FastslimFileError: the file is missing, truncated, damaged, or something else than a fastslim checkpoint.
    """
    if not path.is_file():
        raise FastslimFileError(f"there is no checkpoint {path}")
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(4)
    if size and start != ARCHIVE[:size]:
        raise FastslimFileError(f"{path} is not a fastslim checkpoint: it was not written by torch.save")
    if not zipfile.is_zipfile(path):
        raise FastslimFileError(f"{path} is truncated ({size} bytes): delete it and go on from another checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FastslimFileError(
            f"{path} is not a fastslim checkpoint: it is not plain data, and no code in a file is ever executed"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise FastslimFileError(
            f"{path} is damaged ({str(error).splitlines()[0]}): delete it and go on from another checkpoint"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or any(key not in state for key in ENTRIES):
        raise FastslimFileError(f"{path} is not a fastslim checkpoint: it holds {summary(state)}")
    return state


def summary(state: object) -> str:
    """What a foreign file holds, in a few words."""
    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    return f"the entries {', '.join(map(str, list(state)[:3]))}" + (", ..." if len(state) > 3 else "")


def load_model(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copies a checkpoint's weights into a model, after comparing every key and shape.

    Raises:
        FastslimFileError: it is the checkpoint of another model; the first differing keys are named and the model
            is left as it was.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in weights]
    foreign = [key for key in weights if key not in own]
    reshaped = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if not (missing or foreign or reshaped):
        model.load_state_dict(dict(weights))
        return
    first = [f"it has no {key!r}" for key in missing[:1]]
    first += [f"its {key!r} has no place in the model" for key in foreign[:1]]
    first += [
        f"its {key!r} has shape {tuple(weights[key].shape)}, the model's {tuple(own[key].shape)}"
        for key in reshaped[:1]
    ]
    count = len(missing) + len(foreign) + len(reshaped)
    raise FastslimFileError(
        f"{path} is the checkpoint of another model: {'; '.join(first)} ({count} entries differ). "
        "Use the model and width_mult it was trained with"
    )


def rng_state() -> dict[str, Any]:
    """The state of every global random generator (torch, CUDA, numpy, Python), as plain data."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restores what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
