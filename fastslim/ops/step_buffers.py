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
        slim: parameters of slim layers; their ops write gradients in place.
        ordinary: all other parameters; autograd adds to their (zeroed) views.
    """

    def __init__(self, slim: Iterable[nn.Parameter], ordinary: Iterable[nn.Parameter] = ()) -> None:
        self.slim = [p for p in slim if p.requires_grad]
        self.ordinary = [p for p in ordinary if p.requires_grad]
        self._slots: dict[int, GradientSlot] = {}
        self._casts: dict[tuple[int, torch.dtype], tuple[Tensor, bool]] = {}
        self.flat: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._ordinary_flat: list[Tensor] = []
        self._allocate()

    def _allocate(self) -> None:
        groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for p in [*self.slim, *self.ordinary]:
            groups.setdefault((p.dtype, p.device), []).append(p)
        ordinary_ids = {id(p) for p in self.ordinary}
        for key, parameters in groups.items():
            # Every view starts on a 64-byte boundary.
            step = 64 // parameters[0].element_size()
            sizes = [-(-p.numel() // step) * step for p in parameters]
            flat = torch.zeros(sum(sizes), dtype=key[0], device=key[1])
            self.flat[key] = flat
            offset = 0
            ordinary_start = flat.numel()
            for p, size in zip(parameters, sizes, strict=True):
                if id(p) in ordinary_ids:
                    ordinary_start = min(ordinary_start, offset)
                view = flat.as_strided(p.shape, _dense_strides(p), offset)
                self._slots[id(p)] = GradientSlot(view)
                offset += size
            self._ordinary_flat.append(flat[ordinary_start:])

    def matches(self, slim: Iterable[nn.Parameter], ordinary: Iterable[nn.Parameter]) -> bool:
        """Whether these are still the parameters, dtypes, devices and layouts the buffers were made for."""
        wanted = [[p for p in group if p.requires_grad] for group in (slim, ordinary)]
        return all(
            len(mine) == len(theirs)
            and all(
                a is b and self._slots[id(a)].view.dtype == b.dtype and self._slots[id(a)].view.device == b.device
                and self._slots[id(a)].view.shape == b.shape and self._slots[id(a)].view.stride() == _dense_strides(b)
                for a, b in zip(mine, theirs, strict=True)
            )
            for mine, theirs in zip((self.slim, self.ordinary), wanted, strict=True)
        )

    def begin(self, *, accumulate: bool = False) -> None:
        """Puts the views behind `param.grad` and forgets (or, with `accumulate`, keeps) what they hold.

        A gradient somebody else put into `param.grad` is kept when accumulating, dropped when not.
        """
        self._casts = {key: (tensor, False) for key, (tensor, _) in self._casts.items()}
        if not accumulate:
            for flat in self._ordinary_flat:
                flat.zero_()
        for p in [*self.slim, *self.ordinary]:
            slot = self._slots[id(p)]
            kept = accumulate and p.grad is not None
            if kept and p.grad is not slot.view:
                slot.view.copy_(p.grad)
            slot.fresh = not kept
            if p.grad is not slot.view:
                p.grad = slot.view
        if accumulate:
            for p in self.ordinary:
                if self._slots[id(p)].fresh:
                    self._slots[id(p)].view.zero_()

    def finish(self) -> None:
        """Drops the gradient of slim parameters no pass has reached, as plain autograd would."""
        for p in self.slim:
            if self._slots[id(p)].fresh:
                p.grad = None

    def slot(self, parameter: Tensor) -> GradientSlot | None:
        """The parameter's slot, or None if it is not a slim parameter of this set."""
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
    if _active is None or parameter is None or not torch.is_grad_enabled():
        return None
    return _active.slot(parameter) if parameter.requires_grad else None


def active_cast(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The parameter, detached, in `dtype`: from the step's buffer if there is one, else cast now."""
    if parameter.dtype == dtype:
        return parameter.detach()
    if _active is not None:
        return _active.cast(parameter, dtype)
    return parameter.detach().to(dtype)


def _dense_strides(p: Tensor) -> tuple[int, ...]:
    """Strides of a dense gradient in the parameter's own memory format."""
    return torch.empty_like(p, device="meta").stride()
