"""Loads the compiled libraries. `_C` must load; `_C_cuda` is optional and its absence has a reason."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

_REBUILD = "pip install --no-build-isolation --no-deps ."


def _load() -> dict[str, object]:
    """Imports the library, which registers the CPU ops; returns what it was built with."""
    try:
        return dict(importlib.import_module("fastslim._C").build_info())
    except ImportError as error:
        built = sorted(path.name for path in Path(__file__).parent.glob("_C.*.so"))
        if not built:
            raise ImportError(f"fastslim's compiled library is not built; in its source folder: {_REBUILD}") from None
        raise ImportError(
            f"fastslim's compiled library ({', '.join(built)}) was built for another Python or torch than this "
            f"torch {torch.__version__}: {error}. Build it again in its source folder: {_REBUILD}"
        ) from error


def _load_cuda() -> str | None:
    """Loads the CUDA library; returns why it is not usable, or None."""
    library = Path(__file__).with_name("_C_cuda.so")
    if not library.exists():
        return "built without CUDA (FASTSLIM_CUDA=1 builds it)"
    if not torch.version.cuda:
        return "this torch has no CUDA"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return str(error)
    return None


BUILD: dict[str, object] = _load()
CUDA_UNUSABLE: str | None = _load_cuda()
