"""fastslim: train one network that runs at any width, as fast as the hardware allows."""

# torch first: libtorch must be loaded before the extension.
import torch  # noqa: F401, I001

from fastslim import _ext  # noqa: F401
from fastslim import cost, models, nn, ops, search
from fastslim.algorithms import AutoSlim, verify
from fastslim.algorithms.calibrate import calibrate_batch_norm
from fastslim.errors import FastslimError
from fastslim.export import (
    check_export,
    export_onnx,
    export_subnet,
    export_torch,
    load_slimmable,
    load_subnet,
    save_slimmable,
    save_subnet,
)
from fastslim.mutators import convert, sort_channels

__version__ = "0.1.0"
__all__ = [
    "AutoSlim",
    "FastslimError",
    "calibrate_batch_norm",
    "check_export",
    "convert",
    "cost",
    "export_onnx",
    "export_subnet",
    "export_torch",
    "load_slimmable",
    "load_subnet",
    "models",
    "nn",
    "ops",
    "save_slimmable",
    "save_subnet",
    "search",
    "sort_channels",
    "verify",
]
