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
from fastslim.contract_errors import AssertedValueError, NotImportedError

Function = Callable[..., Any]


def check_path(path: Any, *, method: bool, argument: str) -> None:
    """Refuses what cannot be the path of a function or method, without importing anything.

    Args:
        path: ``"package.module.function"`` or ``"package.module.Class.method"``.
        method: which of the two is expected.
        argument: the name of the argument, for the message.

    Raises:
        FastslimTypeError: no string.
        FastslimValueError: too few dots (an `AssertionError`, too).
    """
    if not isinstance(path, str):
        raise errors.FastslimTypeError(f"{argument} should be an import path (str), but got {type(path).__name__}")
    if path.count(".") < 1 + method:
        form = "two dots, as in 'package.module.Class.method'" if method else "one dot, as in 'package.module.function'"
        hint = "; of a function of a module, use the type that starts with 'Function'" if method else ""
        raise AssertedValueError(f"{argument} must have at least {form}, but got {path!r}{hint}")


def locate(path: str, *, method: bool) -> tuple[Any, str]:
    """The module or class that holds what a path names, and the name it has there.

    Args:
        path: ``"package.module.function"`` or ``"package.module.Class.method"``.
        method: which of the two is expected.

    Raises:
        FastslimValueError: the path cannot be imported (an `ImportError`, too), holds a name that does not
            exist (an `AssertionError`, too), or is of the other kind.
        FastslimTypeError: it is neither a function nor a method.
    """
    parts = path.split(".")
    owner, rest = _import_front(parts)
    for name in rest[:-1]:
        owner = _attribute(owner, name, path)
        if not isinstance(owner, (type, ModuleType)):
            raise errors.FastslimTypeError(
                f"{path!r}: {name} should be a type (a class), but it is of type {type(owner).__name__}"
            )
    name = rest[-1]
    _attribute(owner, name, path)
    if isinstance(owner, ModuleType) == method:
        found, use = ("function of a module", "Function") if method else (f"method of {owner.__name__}", "Method")
        raise errors.FastslimValueError(f"{path!r} is a {found}; use the type that starts with {use!r}")
    raw = inspect.getattr_static(owner, name)
    if isinstance(raw, type) or not (callable(raw) or isinstance(raw, (staticmethod, classmethod))):
        raise errors.FastslimTypeError(
            f"{path!r}: {name} should be a function that can be replaced, but it is of type {type(raw).__name__}"
        )
    return owner, name


def _import_front(parts: list[str]) -> tuple[Any, list[str]]:
    """The longest front of a path that is a module, and what follows it."""
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        try:
            return importlib.import_module(name), parts[end:]
        except ModuleNotFoundError as error:
            # A module that is there, but misses one that it imports itself, must not be taken for absent.
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise NotImportedError(f"{name} is not imported correctly: {error}") from error
    raise NotImportedError(
        f"{parts[0]} is not imported: there is no module {parts[0]!r}; write the whole path of "
        f"{'.'.join(parts)!r}, such as 'package.module.function'"
    )


def _attribute(owner: Any, name: str, path: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        raise AssertedValueError(
            f"{path!r}: {name} is not in {getattr(owner, '__name__', owner)}; {errors.nearest(name, dir(owner))}"
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
