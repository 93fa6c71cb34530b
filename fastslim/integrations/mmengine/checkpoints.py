"""Reads mmengine's own checkpoints where torch refuses them: since 2.6 `torch.load` takes plain data only.

A checkpoint of ``Runner`` holds, beside the weights, the logged values as numpy arrays in a `HistoryBuffer`. Exactly
these classes are allowed while mmengine reads a file; nothing else in it can run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader, load_from_local

from fastslim import errors

_STATISTICS = ("min", "max", "current", "mean")


def _method_of_history_buffer(owner: Any, name: str) -> Any:
    """All that a checkpoint may look up by `getattr`: how logged values are summarised."""
    if owner is not HistoryBuffer or name not in _STATISTICS:
        raise errors.FastslimFileError(
            f"the checkpoint asks for {name!r} of {owner!r}, which is refused: not plain data"
        )
    return getattr(HistoryBuffer, name)


def _allowed() -> list[Any]:
    arrays = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]  # numpy's own names move between versions
    dtypes = [type(np.dtype(kind)) for kind in (bool, int, float, np.int32, np.float32)]
    return [HistoryBuffer, np.ndarray, np.dtype, *arrays, *dtypes, (_method_of_history_buffer, "builtins.getattr")]


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_local_checkpoint(filename: str, map_location: Any) -> Any:
    """As mmengine's loader of local files, but for the classes that are allowed."""
    with torch.serialization.safe_globals(_allowed()):
        return load_from_local(filename, map_location)
