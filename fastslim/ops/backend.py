"""Chooses who computes an op: a pure function of op, target, dtype and shape that can say why."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastslim import _ext, errors
from fastslim.ops import measured

BACKENDS = ("reference", "library", "cpp", "cuda", "triton")
OLDEST_GPU = 80  # compute capability 8.0: the first with bf16 and asynchronous copies


class Choice(NamedTuple):
    """Who computes an op, and why."""

    backend: str
    reason: str


class _Op(NamedTuple):
    backends: tuple[str, ...]
    rule: Callable[..., Choice]
    refuses: Callable[..., str | None]


_OPS: dict[str, _Op] = {}
_forced: str | None = None
_HAS_TRITON = importlib.util.find_spec("triton") is not None


_remembered: list[Any] = [measured.best, measured._table]


def remembered(decide: Callable[..., Any]) -> Any:
    """Keeps the results of a pure function until :func:`forget`."""
    cached = functools.lru_cache(maxsize=65536)(decide)
    _remembered.append(cached)
    return cached


def forget() -> None:
    """Lets every choice be made anew, as after a new table of what was measured."""
    for cached in _remembered:
        cached.cache_clear()


def register(
    op: str,
    backends: tuple[str, ...],
    rule: Callable[..., Choice],
    refuses: Callable[..., str | None] = lambda *call: None,
) -> None:
    """Tells the chooser about an op.

    Args:
        op: name of the op.
        backends: every backend that can compute it; always includes ``"reference"``.
        rule: ``rule(target, dtype, *shape) -> Choice``; pure, its arguments hashable.
        refuses: ``refuses(backend, target, dtype, *shape)``: why a backend that is forced cannot
            compute this call, or None.
    """
    _OPS[op] = _Op(backends, rule, refuses)


def registered_ops() -> dict[str, tuple[str, ...]]:
    """Every op and the backends that can compute it."""
    return {name: op.backends for name, op in _OPS.items()}


def target_of(tensor: Tensor) -> str:
    """What computes on a tensor: ``"cpu"``, an NVIDIA architecture such as ``"sm_90"``, or torch's device type."""
    return tensor.device.type if tensor.device.type != "cuda" else _architecture(tensor.device.index or 0)


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        return "hip"
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def is_gpu(target: str) -> bool:
    """Whether a target is an NVIDIA GPU."""
    return target.startswith("sm_")


def unusable(backend: str, target: str) -> str | None:
    """Why a backend cannot run on a target at all, or None."""
    if backend == "cpp":
        return None if target == "cpu" else "computes on the CPU"
    if backend not in ("cuda", "triton"):
        return None
    if not is_gpu(target):
        return None if backend == "triton" and target == "cpu" and interpreting() else "computes on NVIDIA GPUs"
    if int(target[3:]) < OLDEST_GPU:
        return f"needs compute capability 8.0 (sm_80) or newer, this GPU is {target}"
    if backend == "cuda":
        return _ext.CUDA_UNUSABLE
    return None if _HAS_TRITON else "Triton is not installed (pip install triton)"


def interpreting() -> bool:
    """Whether Triton's interpreter is on, which runs its kernels on the CPU."""
    return _HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def gpu_choice(
    op: str,
    target: str,
    dtype: torch.dtype,
    kernels: tuple[str, ...],
    otherwise: Choice,
    exact: tuple[object, ...] = (),
    sizes: tuple[int, ...] = (),
) -> Choice:
    """The choice on a GPU: what was measured fastest there, else the first of `kernels` that can run.

    Args:
        op: name of the op, or of one of its directions.
        target: see :func:`target_of`.
        dtype: of the computation.
        kernels: our backends that can compute the call, the one estimated fastest first; start with
            ``"library"`` where that is the estimate.
        otherwise: taken when none of them can run; where it is also the first of them, its reason is the estimate's.
        exact: what must be equal in the record, such as kernel size and stride.
        sizes: what may differ from the record, such as rows and channels.
    """
    reasons = {backend: unusable(backend, target) for backend in kernels}
    usable = [backend for backend, reason in reasons.items() if reason is None]
    # Sizes are symbols while torch.compile traces; the estimate holds for all of them.
    record = None if torch.compiler.is_compiling() else measured.best(target, measured.key(op, dtype, *exact), sizes)
    if record is not None and (record.backend in usable or record.backend == otherwise.backend):
        return Choice(record.backend, f"measured fastest on {record.where}")
    if usable and usable[0] == otherwise.backend:
        return otherwise
    if usable:
        return Choice(usable[0], f"estimated fastest; not measured on {target} yet")
    return Choice(otherwise.backend, "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items()))


def choose(op: str, target: str, dtype: torch.dtype, *shape: object) -> Choice:
    """The backend for a call, and the reason.

    Args:
        op: name of a registered op.
        target: see :func:`target_of`.
        dtype: data type of the computation.
        *shape: whatever else the op's own rule looks at.
    """
    # Dynamo looks through caches with a warning; there the plain function is all it needs.
    decide = _choose.__wrapped__ if torch.compiler.is_compiling() else _choose
    return decide(op, target, dtype, shape, _forced)


@remembered
def _choose(op: str, target: str, dtype: torch.dtype, shape: tuple[object, ...], forced: str | None) -> Choice:
    entry = _OPS[op]
    natural = entry.rule(target, dtype, *shape)
    if forced is None or forced == natural.backend:
        return natural
    if forced not in entry.backends:
        return Choice(natural.backend, f"{forced!r} was asked for but {op} has none; {natural.reason}")
    reason = unusable(forced, target) or entry.refuses(forced, target, dtype, *shape)
    if reason is not None:
        return Choice(natural.backend, f"{forced!r} was asked for but {reason}; {natural.reason}")
    return Choice(forced, "forced by FASTSLIM_BACKEND or use_backend")


@contextlib.contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Forces one backend inside a ``with`` block (``None``: the natural choice).

    Raises:
        FastslimValueError: there is no such backend.
    """
    global _forced
    before, _forced = _forced, _checked(backend)
    try:
        yield
    finally:
        _forced = before


def forced_backend() -> str | None:
    """The backend that FASTSLIM_BACKEND or :func:`use_backend` forces, if any."""
    return _forced


def _checked(backend: str | None) -> str | None:
    if backend is not None and backend not in BACKENDS:
        raise errors.FastslimValueError(
            f"no backend {backend!r}: {errors.nearest(backend, BACKENDS)}; known are {', '.join(BACKENDS)}"
        )
    return backend


_forced = _checked(os.environ.get("FASTSLIM_BACKEND") or None)
