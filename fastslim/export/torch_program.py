"""A network as a `torch.export` program (.pt2), which torch runs without the network's Python code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastslim.export.calls import call_with
from fastslim.export.new_file import new_file
from fastslim.export.programs import ExportedFile, capture, checked_module, compare_batches, quiet


def export_torch(
    path: Path | str,
    module: nn.Module,
    example_inputs: Any,
    dynamic_batch: bool = True,
    *,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> ExportedFile:
    """Writes a plain network as a program of `torch.export`, reads it back and compares both.

    ``torch.export.load(path).module()`` runs it; it needs torch alone.

    Args:
        path: of the file, ending in .pt2.
        module: such as `export_subnet` returns; its evaluation mode is what is written.
        example_inputs: real inputs, which both are compared on: a tensor, a tuple of arguments or a dict of keyword
            arguments.
        dynamic_batch: let the program take any number of samples; batches of 1, 2 and 7 are compared then.
        tolerance: how large a part of the output's scale they may differ by; by default 1e-10 in float64, 1e-5 in
            float32, and no less than 10 times the network's own rounding error.
        overwrite: replace a file that is there.

    Returns:
        The file's size, and the largest difference.

    Raises:
        FastslimFileError: the file exists, or the disk refuses.
        FastslimRuntimeError: torch.export cannot take the network, or the program computes something else.
    """
    module = checked_module(module, "export_torch")
    with new_file(path, ".pt2", overwrite) as place:
        call = call_with(module, example_inputs)
        with quiet():
            torch.export.save(capture(module, call, dynamic_batch), place)
            program = torch.export.load(place).module()
        equality, sizes = compare_batches(
            "the torch.export program", module, call, lambda batch: batch.of(program), dynamic_batch, tolerance
        )
        size = place.stat().st_size
    return ExportedFile(Path(path), size, equality, sizes)
