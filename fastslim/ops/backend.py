"""Chooses who computes an op: a pure function of op, device, dtype and shape that can say why."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from fastslim import errors

BACKENDS = ("reference", "library", "cpp", "cuda", "triton")


class Choice(NamedTuple):
    """Who computes an op, and why."""

    backend: str
    reason: str


class _Op(NamedTuple):
    backends: tuple[str, ...]
    rule: Callable[..., Choice]


_OPS: dict[str, _Op] = {}
_forced: str | None = None


def register(op: str, backends: tuple[str, ...], rule: Callable[..., Choice]) -> None:
    """Tells the chooser about an op.

    Args:
        op: name of the op.
        backends: every backend that can compute it; always includes ``"reference"``.
        rule: ``rule(device_type, dtype, *shape) -> Choice``; pure, its arguments hashable.
    """
    _OPS[op] = _Op(backends, rule)


def registered_ops() -> dict[str, tuple[str, ...]]:
    """Every op and the backends that can compute it."""
    return {name: op.backends for name, op in _OPS.items()}


def choose(op: str, device_type: str, dtype: torch.dtype, *shape: object) -> Choice:
    """The backend for a call, and the reason.

    Args:
        op: name of a registered op.
        device_type: ``"cpu"``, ``"cuda"``, ...
        dtype: data type of the computation.
        *shape: whatever else the op's own rule looks at.
    """
    # Dynamo looks through caches with a warning; there the plain function is all it needs.
    decide = _choose.__wrapped__ if torch.compiler.is_compiling() else _choose
    return decide(op, device_type, dtype, shape, _forced)


@functools.lru_cache(maxsize=4096)
def _choose(op: str, device_type: str, dtype: torch.dtype, shape: tuple[object, ...], forced: str | None) -> Choice:
    entry = _OPS[op]
    natural = entry.rule(device_type, dtype, *shape)
    if forced is None or forced == natural.backend:
        return natural
    if forced not in entry.backends:
        return Choice(natural.backend, f"{forced!r} was asked for but {op} has none; {natural.reason}")
    if forced == "cpp" and device_type != "cpu":
        return Choice(natural.backend, f"'cpp' was asked for but the tensor is on {device_type}; {natural.reason}")
    if forced in ("cuda", "triton") and device_type != "cuda":
        return Choice(natural.backend, f"{forced!r} was asked for but the tensor is on {device_type}; {natural.reason}")
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
        raise errors.FastslimValueError(f"no backend {backend!r}: {errors.nearest(backend, BACKENDS)}")
    return backend


_forced = _checked(os.environ.get("FASTSLIM_BACKEND") or None)
