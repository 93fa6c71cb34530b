"""Memory a training step reuses: one flat gradient buffer behind `param.grad`, weights cast and packed once.

Inside `StepBuffers.active()` the slim ops write parameter gradients straight into
`param.grad[:c_out, :c_in]`; outside it they return ordinary gradients to autograd. Batch counters are
added to together at the end of a pass. On a GPU, where every small launch costs as much as its work,
gradients are collected and added then, too, and weights are cast and packed together at the start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from fastslim.ops.prefix_pack import Transfer, prefix_unpack_add
from fastslim.ops.weight_cache import Prefix, WeightCache

_active: StepBuffers | None = None
_ACCUMULATED = "_post_accumulate_grad_hooks"


class GradientSlot:
    """One parameter's part of the flat gradient buffer.

    Attributes:
        view: full-size gradient of the parameter, a view of the flat buffer.
        fresh: nothing has been written since :meth:`StepBuffers.begin`; what is stored is stale.
    """

    __slots__ = ("_owner", "_queued", "fresh", "view")

    def __init__(self, view: Tensor, owner: StepBuffers) -> None:
        self.view = view
        self.fresh = True
        self._owner = owner
        self._queued: int | None = None  # the memory whose values wait to be added

    def target(self, region_full: bool) -> tuple[Tensor, bool]:
        """Where a kernel writes, and whether it must add (True) or overwrite (False).

        Args:
            region_full: the kernel will write every element of the view.
        """
        if self._queued is not None:
            self._owner.flush()
        return self.view, self._claim(region_full)

    def _claim(self, region_full: bool) -> bool:
        if not self.fresh:
            return True
        self.fresh = False
        if not region_full:
            self.view.zero_()
        return not region_full

    def add(self, value: Tensor, region: Tensor, region_full: bool) -> None:
        """Adds `value` to `region`, a part of :attr:`view`; the step's first gradient overwrites.

        On a GPU `value` is added when the pass ends: it must not change until then.
        """
        if self._owner.collects and not value.is_sparse:
            memory = value.untyped_storage().data_ptr()
            if self._queued not in (None, memory):  # the module was called twice: regions may overlap
                self._owner.flush()
            self._owner.queue(self, Transfer(value, region, self._claim(region_full)))
            self._queued = memory
            return
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
        collect: add gradients together at the end of a pass; by default where parameters are on a GPU.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, collect: bool | None = None) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        #: Whether gradients wait for the end of the pass.
        self.collects = any(p.is_cuda for p in self.parameters) if collect is None else collect
        self._queue: list[tuple[GradientSlot, Transfer]] = []
        self._counters: dict[int, Tensor] = {}
        self.flat: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._slots: dict[int, GradientSlot] = {}
        self.weights = WeightCache(together=self.collects)
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
                self._slots[id(p)] = GradientSlot(flat.as_strided(p.shape, _dense_strides(p), offset), self)
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
        self.drop()
        self.weights.begin()
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

    def end_pass(self) -> None:
        """Adds to batch counters; on a GPU also what was collected, and autograd's gradients of layers not slim."""
        if self.collects:
            self._take_over()
        self.flush()
        if self._counters:
            torch._foreach_add_(list(self._counters.values()), 1)
            self._counters = {}

    def finish(self) -> None:
        """Puts the flat views behind `param.grad`; a parameter no pass has reached keeps None.

        A sparse gradient, of an embedding that asks for one, stays autograd's.
        """
        self._take_over()
        self.flush()
        for p in self.parameters:
            slot = self._slots[id(p)]
            if not slot.fresh:
                p.grad = slot.view

    def _take_over(self) -> None:
        for p in self.parameters:
            slot = self._slots[id(p)]
            if p.grad is not None and p.grad is not slot.view and not (p.grad.is_sparse and slot.fresh):
                slot.add(p.grad, slot.view, region_full=True)
                p.grad = None  # the next pass's would be added to it

    @property
    def device(self) -> torch.device:
        """Where the parameters are; the first one's, if they are on several devices."""
        return self.parameters[0].device if self.parameters else torch.device("cpu")

    def packs_for(self, inputs: Iterable[Tensor]) -> bool:
        """Whether packing the weights together pays: on a GPU, for images in channels_last."""
        return self.collects and any(
            t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) for t in inputs
        )

    def queue(self, slot: GradientSlot, transfer: Transfer) -> None:
        """Keeps a gradient for :meth:`flush`."""
        self._queue.append((slot, transfer))

    def flush(self) -> None:
        """Adds all collected gradients in one launch."""
        queue, self._queue = self._queue, []
        for slot, _ in queue:
            slot._queued = None
        by_device: dict[torch.device, list[Transfer]] = {}
        for _, transfer in queue:
            by_device.setdefault(transfer.target.device, []).append(transfer)
        for transfers in by_device.values():
            prefix_unpack_add(*map(list, zip(*transfers, strict=True)))

    def drop(self) -> None:
        """Forgets what a failed pass has collected."""
        for slot, _ in self._queue:
            slot._queued = None
        self._queue, self._counters = [], {}

    def count(self, counter: Tensor) -> bool:
        """Whether the end of the pass will add one to a batch counter."""
        if id(counter) in self._counters:  # one launch cannot add to a number twice
            return False
        self._counters[id(counter)] = counter
        return True

    def fresh(self) -> list[GradientSlot]:
        """The slots that nothing has been written to in this step."""
        return [slot for slot in self._slots.values() if slot.fresh]

    def slot(self, parameter: Tensor) -> GradientSlot | None:
        """The parameter's slot, or None if it does not belong to this set."""
        return self._slots.get(id(parameter))

    @contextlib.contextmanager
    def active(self) -> Iterator[StepBuffers]:
        """Inside this block slim ops use these buffers."""
        global _active
        before, _active = _active, self
        try:
            yield self
        finally:
            _active = before


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def count_batch(counter: Tensor) -> None:
    """Adds one to a batch counter: now, or together with all others at the end of a step's pass."""
    if _active is None or not _active.count(counter):
        counter.add_(1)


def active_packed(weight: Tensor, dtype: torch.dtype, prefix: Prefix) -> Tensor | None:
    """What the current pass of a step has packed of a weight, if it has."""
    return None if _active is None else _active.weights.packed(weight, dtype, prefix)


def active_slot(parameter: Tensor | None) -> GradientSlot | None:
    """The slot that receives this parameter's gradient, or None outside a step."""
    if _active is None or parameter is None or not torch.is_grad_enabled() or not parameter.requires_grad:
        return None
    # A hook expects the gradient itself, so this parameter takes autograd's way.
    if parameter._backward_hooks or getattr(parameter, _ACCUMULATED, None):
        return None
    return _active.slot(parameter)


def active_slots(*parameters: Tensor) -> list[GradientSlot] | None:
    """The slots of a layer's parameters as :func:`active_slot` gives them, if all of them have one."""
    if _active is None or not torch.is_grad_enabled():
        return None
    slots = []
    for p in parameters:
        slot = _active.slot(p)
        if slot is None or not p.requires_grad or p._backward_hooks or getattr(p, _ACCUMULATED, None):
            return None
        slots.append(slot)
    return slots


def active_cast(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The parameter, detached, in `dtype`: from the step's buffer if there is one, else cast now."""
    if parameter.dtype == dtype:
        return parameter.detach()
    if _active is not None:
        return _active.weights.cast(parameter, dtype)
    return parameter.detach().to(dtype)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast, if it is on, computes this input in; as torch, it leaves float64 alone."""
    return None if x.dtype == torch.float64 else autocast_dtype_on(x.device.type)


def autocast_dtype_on(device_type: str) -> torch.dtype | None:
    """What autocast computes in on a kind of device, or None if it is off there."""
    if device_type not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device_type):
        return None  # such as "meta", about which torch raises an error
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _same_storage_form(view: Tensor, p: Tensor) -> bool:
    return (
        view.dtype == p.dtype
        and view.device == p.device
        and view.shape == p.shape
        and (view.stride() == p.stride() or view.stride() == _dense_strides(p))  # the first takes a tenth of the time
    )


def _dense_strides(p: Tensor) -> tuple[int, ...]:
    """Strides of a dense gradient in the parameter's own memory format."""
    return torch.empty_like(p, device="meta").stride()
