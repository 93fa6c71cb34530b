"""What the formats of other runtimes share: a captured program of a network, and its check on several batches."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fastslim.errors import FastslimRuntimeError, FastslimTypeError
from fastslim.export.calls import Call, batch_size, has_batch, with_batch
from fastslim.export.equality import Equality, evaluating, require_equal
from fastslim.nn import SlimLayer

#: Batches of other sizes than the example's that a program is compared on.
BATCHES = (1, 2, 7)


@dataclass(frozen=True)
class ExportedFile:
    """A file that was written, read back, and found to compute what the network does.

    Attributes:
        path: of the file.
        size: in bytes.
        difference: the largest absolute difference of an output.
        equality: that of the batch with the largest difference.
        batch_sizes: what was compared.
    """

    path: Path
    size: int
    equality: Equality
    batch_sizes: tuple[int, ...]

    @property
    def difference(self) -> float:
        """The largest absolute difference of an output."""
        return self.equality.difference

    def __str__(self) -> str:
        batches = ", ".join(map(str, self.batch_sizes))
        return f"{self.path}: {self.size} bytes; batches of {batches}: {self.equality}"


def checked_module(module: Any, caller: str) -> nn.Module:
    """The module.

    Raises:
        FastslimTypeError: it is none, or still holds slim layers.
    """
    if not isinstance(module, nn.Module):
        raise FastslimTypeError(f"{caller} takes a torch.nn.Module, got {type(module).__name__}")
    if any(isinstance(part, SlimLayer) for part in module.modules()):
        raise FastslimTypeError(
            f"this {type(module).__name__} is a supernet: {caller} takes the plain network that "
            "fastslim.export_subnet(algo, subnet) returns"
        )
    return module


def open_batch(module: nn.Module, call: Call, mark: Any) -> dict[str, Any]:
    """`dynamic_shapes` that leave the first dimension of all tensors open that share the first one's batch size."""
    size = batch_size(call)
    args, kwargs = pytree.tree_map(lambda value: {0: mark} if has_batch(value, size) else None, tuple(call))
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


def capture(module: nn.Module, call: Call, dynamic_batch: bool) -> torch.export.ExportedProgram:
    """The network in evaluation mode as a graph of torch operators.

    Args:
        module: a plain network.
        call: example inputs.
        dynamic_batch: leave the batch size open, see `open_batch`.

    Raises:
        FastslimRuntimeError: the network cannot be captured; names it and the reason.
    """
    shapes = None
    if dynamic_batch:
        # Of two samples: a size of one would be taken for a constant, and the file keeps the example.
        call = with_batch(call, 2)
        shapes = open_batch(module, call, torch.export.Dim("batch", min=1))
    try:
        with evaluating(module), quiet():
            return torch.export.export(module, call.args, call.kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        hint = "; its batch size may be fixed: pass dynamic_batch=False" if dynamic_batch else ""
        raise FastslimRuntimeError(
            f"torch.export cannot take {type(module).__name__} ({first_line(error)}){hint}. The network that "
            "export_subnet returns runs as it is, and save_subnet keeps it"
        ) from error


def compare_batches(
    what: str, module: nn.Module, call: Call, run: Callable[[Call], Any], dynamic_batch: bool, tolerance: float | None
) -> tuple[Equality, tuple[int, ...]]:
    """Compares a program with the network it was made of.

    Args:
        what: the program, for the message.
        module: the network.
        call: real inputs.
        run: the program's output for a call.
        dynamic_batch: whether it takes batches of other sizes.
        tolerance: as `require_equal` takes it.

    Returns:
        The comparison with the largest difference, and the sizes of all batches.

    Raises:
        FastslimRuntimeError: they differ, or the program fails.
    """
    present = batch_size(call)
    sizes = tuple(dict.fromkeys((present, *BATCHES))) if dynamic_batch else (present,)
    found = []
    with evaluating(module):
        for size in sizes:
            batch = with_batch(call, size) if dynamic_batch else call
            try:
                got = run(batch)
            except Exception as error:
                raise FastslimRuntimeError(
                    f"{what} fails on a batch of {size}, which {type(module).__name__} takes: {first_line(error)}"
                ) from error
            found.append(require_equal(f"{what}, on a batch of {size},", module, batch, got, tolerance))
    return max(found, key=lambda equality: equality.relative), sizes


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what torch tells itself, and no user can act on, off the screen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message="# The axis name")  # two inputs with the same batch size
        yield


def first_line(error: Exception) -> str:
    """What an error says in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
