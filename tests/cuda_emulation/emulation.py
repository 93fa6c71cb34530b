"""Compiles CUDA kernels for the host, against the emulation of CUDA in this folder."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
# A host reads vectors at any address, a GPU does not: what would fail there stops the program here.
FLAGS += ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]


def compiled(source: Path, target: Path, *flags: str | Path) -> Path:
    """`target`, compiled from `source` by the host compiler; among the flags may be further sources."""
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, *FLAGS, *flags, f"-I{HERE}", f"-I{ROOT / 'csrc/include'}", source, "-o", target]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def emulated(stem: str, folder: Path, kernels: str | None = None) -> ctypes.CDLL:
    """The launchers of csrc/cuda/<stem>.cu as tests/cuda_emulation/<stem>.cpp exports them.

    Args:
        stem: of the op.
        folder: where the library is written.
        kernels: pattern of the files in csrc/cuda/ that the .cpp file needs but does not include.
    """
    others = sorted((ROOT / "csrc/cuda").glob(kernels)) if kernels else []
    flags = ["-fPIC", "-shared", *(["-x", "c++", *others] if others else [])]
    return ctypes.CDLL(str(compiled(HERE / f"{stem}.cpp", folder / f"{stem}.so", *flags)))


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Where a tensor lies, for a launcher's argument."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
