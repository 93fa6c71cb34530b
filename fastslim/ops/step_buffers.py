"""Memory a training step reuses: one flat gradient buffer behind `param.grad`, and weights cast once.

Inside `StepBuffers.active()` the slim ops write parameter gradients straight into
`param.grad[:c_out, :c_in]`; outside it they return ordinary gradients to autograd.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

_active: StepBuffers | None = None


class GradientSlot:
    """One parameter's part of the flat gradient buffer.

    Attributes:
        view: full-size gradient of the parameter, a view of the flat buffer.
        fresh: nothing has been written since :meth:`StepBuffers.begin`; what is stored is stale.
    """

    __slots__ = ("fresh", "view")

    def __init__(self, view: Tensor) -> None:
        self.view = view
        self.fresh = True

    def target(self, region_full: bool) -> tuple[Tensor, bool]:
        """Where a kernel writes, and whether it must add (True) or overwrite (False).

        Args:
            region_full: the kernel will write every element of the view.
        """
        if not self.fresh:
            return self.view, True
        self.fresh = False
        if region_full:
            return self.view, False
        self.view.zero_()
        return self.view, True

    def add(self, value: Tensor, region: Tensor, region_full: bool) -> None:
        """Adds `value` to `region`, a part of :attr:`view`; the step's first gradient overwrites."""
        _, accumulate = self.target(region_full)
        if accumulate:
            region.add_(value)
        else:
            region.copy_(value)


class StepBuffers:
    """Flat gradients and low-precision weights of a set of parameters.

    Args:
        parameters: those that require a gradient get a slot; slim ops write into it, the gradients
            autograd makes for other layers are moved there by :meth:`finish`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.flat: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._slots: dict[int, GradientSlot] = {}
        self._casts: dict[tuple[int, torch.dtype], tuple[Tensor, bool]] = {}
        groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for p in self.parameters:
            groups.setdefault((p.dtype, p.device), []).append(p)
        for (dtype, device), group in groups.items():
            alignment = 64 // group[0].element_size()  # every view starts on a cache line
            sizes = [-(-p.numel() // alignment) * alignment for p in group]
            flat = torch.zeros(sum(sizes), dtype=dtype, device=device)
            self.flat[dtype, device] = flat
            offset = 0
            for p, size in zip(group, sizes, strict=True):
                self._slots[id(p)] = GradientSlot(flat.as_strided(p.shape, _dense_strides(p), offset))
                offset += size

    def matches(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether these are still the parameters, dtypes, devices and layouts the buffers were made for."""
        wanted = [p for p in parameters if p.requires_grad]
        return len(wanted) == len(self.parameters) and all(
            mine is p and _same_storage_form(self._slots[id(p)].view, p)
            for mine, p in zip(self.parameters, wanted, strict=True)
        )

    def begin(self, *, accumulate: bool = False) -> None:
        """Starts a step: forgets all gradients or, with `accumulate`, keeps those in `param.grad`."""
        self._casts = {key: (tensor, False) for key, (tensor, _) in self._casts.items()}
        for p in self.parameters:
            slot = self._slots[id(p)]
            slot.fresh = not accumulate or p.grad is None
            if slot.fresh:
                p.grad = None
            elif p.grad.is_sparse:
                slot.fresh = True  # autograd itself adds to it
            elif p.grad is not slot.view:
                slot.view.copy_(p.grad)
                p.grad = slot.view

    def finish(self) -> None:
        """Puts the flat views behind `param.grad`; a parameter no pass has reached keeps None.

        A sparse gradient, of an embedding that asks for one, stays autograd's.
        """
        for p in self.parameters:
            slot = self._slots[id(p)]
            if p.grad is not None and p.grad.is_sparse and slot.fresh:
                continue
            if p.grad is not None and p.grad is not slot.view:  # autograd's own, of a layer that is not slim
                slot.add(p.grad, slot.view, region_full=True)
            if not slot.fresh:
                p.grad = slot.view

    def slot(self, parameter: Tensor) -> GradientSlot | None:
        """The parameter's slot, or None if it does not belong to this set."""
        return self._slots.get(id(parameter))

    def cast(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """The parameter in `dtype`, cast once per step into a buffer that lives on."""
        key = (id(parameter), dtype)
        tensor, valid = self._casts.get(key, (None, False))
        if tensor is None:
            tensor = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        if not valid:
            tensor.copy_(parameter.detach())
            self._casts[key] = (tensor, True)
        return tensor

    @contextlib.contextmanager
    def active(self) -> Iterator[StepBuffers]:
        """Inside this block slim ops use these buffers."""
        global _active
        before, _active = _active, self
        try:
            yield self
        finally:
            _active = before


def active_slot(parameter: Tensor | None) -> GradientSlot | None:
    """The slot that receives this parameter's gradient, or None outside a step."""
    if _active is None or parameter is None or not torch.is_grad_enabled() or not parameter.requires_grad:
        return None
    # A hook expects the gradient itself, so this parameter takes autograd's way.
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        return None
    return _active.slot(parameter)


def active_cast(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The parameter, detached, in `dtype`: from the step's buffer if there is one, else cast now."""
    if parameter.dtype == dtype:
        return parameter.detach()
    if _active is not None:
        return _active.cast(parameter, dtype)
    return parameter.detach().to(dtype)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast, if it is on, computes this input in; as torch, it leaves float64 alone."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and x.dtype != torch.float64 else None


def _same_storage_form(view: Tensor, p: Tensor) -> bool:
    return (
        view.dtype == p.dtype
        and view.device == p.device
        and view.shape == p.shape
        and view.stride() == _dense_strides(p)
    )


def _dense_strides(p: Tensor) -> tuple[int, ...]:
    """Strides of a dense gradient in the parameter's own memory format."""
    return torch.empty_like(p, device="meta").stride()
