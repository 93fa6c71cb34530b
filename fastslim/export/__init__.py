"""Subnets as plain torch modules, and as files: safetensors, `torch.export` programs, ONNX."""

from fastslim.export.equality import Equality, check_export
from fastslim.export.fold import fold_batch_norm
from fastslim.export.onnx_model import export_onnx
from fastslim.export.programs import ExportedFile
from fastslim.export.slimmable_file import load_slimmable, save_slimmable
from fastslim.export.subnet import export_subnet
from fastslim.export.subnet_file import SavedSubnet, load_subnet, save_subnet
from fastslim.export.switching import SwitchableNetwork
from fastslim.export.torch_program import export_torch

__all__ = [
    "Equality",
    "ExportedFile",
    "SavedSubnet",
    "SwitchableNetwork",
    "check_export",
    "export_onnx",
    "export_subnet",
    "export_torch",
    "fold_batch_norm",
    "load_slimmable",
    "load_subnet",
    "save_slimmable",
    "save_subnet",
]
