"""Packages that only some formats need: imported when they are used, with the command that installs them."""

from __future__ import annotations

import importlib
from typing import Any

from fastslim.errors import FastslimRuntimeError

# The extra of fastslim that brings a package.
EXTRAS = {"safetensors": "export", "onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx"}


def need(name: str, purpose: str) -> Any:
    """Imports a package, or one of its modules.

    Args:
        name: such as "safetensors.torch".
        purpose: what cannot be done without it.

    Raises:
        FastslimRuntimeError: it is not installed; gives the command that installs it.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FastslimRuntimeError(
            f"{purpose} needs the package {package}: pip install 'fastslim[{EXTRAS[package]}]' ({error})"
        ) from error
