"""A network as an ONNX model, which runs without Python's torch."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastslim.errors import FastslimRuntimeError, FastslimValueError
from fastslim.export.calls import Call, call_with
from fastslim.export.new_file import new_file
from fastslim.export.packages import need
from fastslim.export.programs import (
    ExportedFile,
    capture,
    checked_module,
    compare_batches,
    first_line,
    open_batch,
    quiet,
)

# Protocol buffers end at 2 GiB; the graph beside the weights is small.
_LARGEST = 2**31 - 2**24


def export_onnx(
    path: Path | str,
    module: nn.Module,
    example_inputs: Any,
    dynamic_batch: bool = True,
    opset: int | None = None,
    *,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> ExportedFile:
    """Writes a plain network as one ONNX file, runs it in onnxruntime and compares both.

    Args:
        path: of the file, ending in .onnx.
        module: such as `export_subnet` returns; its evaluation mode is what is written.
        example_inputs: real inputs, which both are compared on: a tensor, a tuple of arguments or a dict of keyword
            arguments. Inputs of the model are called after forward's arguments.
        dynamic_batch: let the model take any number of samples; batches of 1, 2 and 7 are compared then.
        opset: version of the operators, 18 or later; torch's usual one when None.
        tolerance: as for `export_torch`.
        overwrite: replace a file that is there.

    Returns:
        The file's size, and the largest difference.

    Raises:
        FastslimFileError: the file exists, or the disk refuses.
        FastslimRuntimeError: a package is missing, torch cannot take the network, or the model computes something
            else.
        FastslimValueError: the weights do not fit into one ONNX file, or there is no such opset for the network.
    """
    module = checked_module(module, "export_onnx")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(package, "export_onnx")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    if weights > _LARGEST:
        raise FastslimValueError(
            f"{type(module).__name__} has {weights / 2**30:.2f} GiB of weights, an ONNX file holds 2: use export_torch"
        )
    with new_file(path, ".onnx", overwrite) as place:
        call = call_with(module, example_inputs)
        program = capture(module, call, dynamic_batch)
        names = _axis_names(module, call) if dynamic_batch else None
        try:
            with quiet(), _silent_exporter():
                written = torch.onnx.export(
                    program,
                    f=place,
                    dynamo=True,
                    external_data=False,
                    opset_version=opset,
                    verbose=False,
                    dynamic_shapes=names,
                )
        except Exception as error:
            raise FastslimRuntimeError(
                f"torch.onnx cannot take {type(module).__name__} ({first_line(error)}). export_torch writes it for "
                "torch, and the network that export_subnet returns runs as it is"
            ) from error
        version = written.model.opset_imports.get("")
        if opset not in (None, version):
            raise FastslimValueError(
                f"torch cannot write {type(module).__name__} with opset {opset}, only with {version}: leave opset out, "
                "or take one from 18 on that the onnx package knows"
            )
        try:
            model = _Model(place)
        except Exception as error:
            raise FastslimRuntimeError(
                f"onnxruntime cannot run {type(module).__name__} ({first_line(error)}). Of float64 and bfloat16 it "
                "knows few operators: export module.float()"
            ) from error
        equality, sizes = compare_batches("the ONNX model", module, call, model, dynamic_batch, tolerance)
        size = place.stat().st_size
    return ExportedFile(Path(path), size, equality, sizes)


def _axis_names(module: nn.Module, call: Call) -> dict[str, Any]:
    """Names of open dimensions, for arguments that become inputs; constants do not."""
    given = inspect.signature(module.forward).bind(*call.args, **call.kwargs).arguments
    return {
        name: names
        for name, names in open_batch(module, call, "batch").items()
        if any(isinstance(value, Tensor) for value in pytree.tree_leaves(given[name]))
    }


class _Model:
    """Runs an ONNX file on the CPU."""

    def __init__(self, path: Path) -> None:
        runtime = need("onnxruntime", "export_onnx")
        self.session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_inputs()]

    def __call__(self, call: Call) -> Any:
        tensors = [value for value in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(value, Tensor)]
        return self.session.run(None, dict(zip(self.names, (t.detach().cpu().numpy() for t in tensors), strict=True)))


@contextlib.contextmanager
def _silent_exporter() -> Iterator[None]:
    """The exporter warns about other people's packages that are not installed, and of versions it cannot write."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
