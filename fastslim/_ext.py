"""Loads the compiled libraries. `_C` must load; `_C_cuda` is optional and its absence has a reason."""

from __future__ import annotations

from pathlib import Path

import torch

try:
    from fastslim import _C
except ImportError as error:  # not built, or built for another Python or torch
    raise ImportError(
        f"fastslim's compiled library cannot be loaded ({error}). Build it for this environment: "
        "pip install --no-build-isolation --no-deps ."
    ) from error

BUILD: dict[str, object] = dict(_C.build_info())


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


CUDA_UNUSABLE: str | None = _load_cuda()
