"""Finds a function or method by its import path and replaces it for the length of a `with` block."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from fastslim import errors

Function = Callable[..., Any]


def locate(path: str, *, method: bool) -> tuple[Any, str]:
    """The module or class that holds what a path names, and the name it has there.

    Args:
        path: ``"package.module.function"`` or ``"package.module.Class.method"``.
        method: which of the two is expected.

    Raises:
        FastslimValueError: nothing can be imported under this path, or something of the other kind.
    """
    parts = path.split(".")
    owner: Any = None
    for end in range(len(parts) - 1, 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            owner = importlib.import_module(".".join(parts[:end]))
            break
    if owner is None:
        raise errors.FastslimValueError(
            f"{path!r}: there is no module {parts[0]!r}; write the whole path, such as 'package.module.function'"
        )
    for name in parts[end:-1]:
        owner = _attribute(owner, name, path)
    _attribute(owner, parts[-1], path)
    if isinstance(owner, ModuleType) == method:
        found, use = ("function of a module", "Function") if method else (f"method of {owner.__name__}", "Method")
        raise errors.FastslimValueError(f"{path!r} is a {found}; use the type that starts with {use!r}")
    return owner, parts[-1]


def _attribute(owner: Any, name: str, path: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        raise errors.FastslimValueError(
            f"{path!r}: {getattr(owner, '__name__', owner)} has no {name!r}; {errors.nearest(name, dir(owner))}"
        ) from None


@contextlib.contextmanager
def replaced(path: str, wrap: Callable[[Function, bool], Function], *, method: bool) -> Iterator[None]:
    """Calls of a function go through a wrapper inside the block.

    Only calls that look the function up where `path` says are seen: a name imported with
    ``from module import function`` before still means the original.

    Args:
        path: see :func:`locate`.
        wrap: ``wrap(original, bound)`` makes the wrapper; `bound` says that the first argument is self or cls.
        method: whether `path` names a method.
    """
    owner, name = locate(path, method=method)
    raw = inspect.getattr_static(owner, name)
    is_own = name in vars(owner)
    if isinstance(raw, (staticmethod, classmethod)):
        original = raw.__func__
        wrapper: Any = type(raw)(functools.wraps(original)(wrap(original, isinstance(raw, classmethod))))
    else:
        wrapper = functools.wraps(raw)(wrap(raw, method))
    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, raw)
        else:
            delattr(owner, name)


def detached(value: Any) -> Any:
    """A value with all tensors in its tuples, lists, dicts and dataclasses detached from the graph."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: detached(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: detached(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(detached, value))
    return type(value)(map(detached, value)) if type(value) in (tuple, list) else value
