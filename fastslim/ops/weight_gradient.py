"""Where a parameter's gradient goes, and how a matrix product's is computed by the library."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastslim.ops import backend, measured
from fastslim.ops.segments import Segments, pieces
from fastslim.ops.step_buffers import GradientSlot


class GradientSink:
    """Where one parameter's gradient goes: its slot of the step's buffer, or a new tensor for autograd.

    Args:
        parameter: the full-size parameter.
        slot: its slot inside a step.
        everything: every element of the gradient will be written.

    Attributes:
        full: the full-size gradient, whose regions are given to :meth:`add`.
    """

    def __init__(self, parameter: Tensor, slot: GradientSlot | None, everything: bool) -> None:
        self.slot, self.everything = slot, everything
        if slot is not None:
            self.full = slot.view
        else:
            self.full = (torch.empty_like if everything else torch.zeros_like)(parameter)

    def target(self) -> tuple[Tensor, bool]:
        """:attr:`full` for a kernel that writes into it, and whether it must add (True) or overwrite (False)."""
        return (self.full, False) if self.slot is None else self.slot.target(self.everything)

    def add(self, value: Tensor, region: Tensor) -> None:
        """Adds `value` to `region`, a part of :attr:`full`."""
        if self.slot is None:
            region.copy_(value)
        else:
            self.slot.add(value, region, self.everything)

    @property
    def returned(self) -> Tensor | None:
        """What the backward pass returns to autograd."""
        return self.full if self.slot is None else None


def product_route(
    target: str, dtype: torch.dtype, gradient_dtype: torch.dtype, sizes: tuple[int, int, int], refused: str | None
) -> backend.Choice:
    """How ``grads^T @ inputs`` reaches the gradient: ``"addmm"``, ``"addmm_dtype"`` or ``"mm"``.

    Args:
        target: see :func:`backend.target_of`.
        dtype: of the operands.
        gradient_dtype: of the gradient.
        sizes: rows, c_in, c_out.
        refused: why torch has no product of 16-bit operands with a float32 result here, or None.
    """
    if dtype == gradient_dtype:
        return backend.Choice("addmm", "added straight into the gradient, beta = 1")
    if not backend.is_gpu(target) or gradient_dtype != torch.float32:
        return backend.Choice("mm", f"only GPUs add {dtype} products to {gradient_dtype}")
    if refused is not None:
        return backend.Choice("mm", refused)
    record = measured.best(target, measured.key("matrix_gradient", dtype), sizes)
    if record is not None and record.backend in ("addmm_dtype", "mm"):
        return backend.Choice(record.backend, f"measured fastest on {record.where}")
    return backend.Choice("addmm_dtype", f"no rounding, no further launch; not measured on {target} yet")


@functools.cache
def _addmm_dtype_refused(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `addmm` cannot add a 16-bit product to a strided float32 matrix on this device, or None."""
    if device.type != "cuda" or not hasattr(torch.ops.aten.addmm, "dtype_out"):
        return "torch has no addmm with a float32 result of 16-bit operands here"
    operand = torch.eye(8, dtype=dtype, device=device) * 3
    held = torch.arange(128.0, device=device).view(8, 16)
    expected = held.clone()
    expected[:, :8] += 9 * torch.eye(8, device=device)
    try:
        _addmm_dtype(held[:, :8], operand, operand, accumulate=True)
    except RuntimeError as error:  # some versions want the matrix that is added in 16 bit, too
        return f"torch's addmm refuses it: {error}"
    # Waits for the device, once in a process.
    return None if torch.equal(held, expected) else "torch's addmm computes something else here"


def _addmm_dtype(region: Tensor, grads: Tensor, inputs: Tensor, accumulate: bool) -> None:
    torch.ops.aten.addmm.dtype_out(region, grads.t(), inputs, torch.float32, beta=int(accumulate), out=region)


def add_product(sink: GradientSink, grads: Tensor, inputs: Tensor, segments: Segments | None) -> None:
    """Adds ``grads (rows, c_out)^T @ inputs (rows, c_in)`` to the active region of a weight's gradient.

    Args:
        sink: of a weight ``(C_out, C_in)`` or ``(C_out, C_in, 1, 1)``.
        grads: the output's gradient.
        inputs: the layer's input.
        segments: which input channels are active.
    """
    (rows, c_out), c_in = grads.shape, inputs.shape[1]
    matrix = sink.full[:c_out] if sink.full.dim() == 2 else sink.full[:c_out, :, 0, 0]
    target = backend.target_of(grads)
    mixed = grads.dtype != matrix.dtype and backend.is_gpu(target)
    refused = _addmm_dtype_refused(grads.device, grads.dtype) if mixed else None
    route = product_route(target, grads.dtype, matrix.dtype, (rows, c_in, c_out), refused).backend
    accumulate = sink.target()[1] if route != "mm" else False
    for start, offset, count in pieces(segments, c_in):
        region, columns = matrix.narrow(1, start, count), inputs.narrow(1, offset, count)
        if not count:
            continue
        if route == "addmm":
            region.addmm_(grads.t(), columns, beta=int(accumulate))
        elif route == "addmm_dtype":
            _addmm_dtype(region, grads, columns, accumulate)
        else:
            sink.add(_product(grads, columns), region)


def _product(grads: Tensor, inputs: Tensor) -> Tensor:
    """`grads^T @ inputs` in low precision, in the orientation whose longer side oneDNN blocks better.

    16 -> 96 channels over 50 176 pixels in bf16 on 2 cores: 0.98 ms against 1.87 ms.
    """
    if grads.shape[1] > inputs.shape[1] and len(grads) >= 2048:
        return torch.mm(inputs.t(), grads).t()
    return torch.mm(grads.t(), inputs)
