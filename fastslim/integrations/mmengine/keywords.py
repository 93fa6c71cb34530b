"""Misspelt keys of a config that mmengine builds from: the nearest argument instead of Python's bare error."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from fastslim import errors

_Class = TypeVar("_Class", bound=type)


def checks_keywords(described_by: type | None = None) -> Callable[[_Class], _Class]:
    """A class decorator: unknown keywords of the constructor are refused with the nearest known one.

    Args:
        described_by: a class whose constructor names the arguments; by default the decorated one.
    """

    def decorate(cls: _Class) -> _Class:
        constructor: Any = getattr(cls, "__init__")  # noqa: B009  # mypy: unsound on an instance, but this is a class
        described: Any = constructor if described_by is None else vars(described_by)["__init__"]
        known = [name for name in inspect.signature(described).parameters if name != "self"]

        @functools.wraps(described)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            for key in kwargs:
                if key not in known:
                    raise errors.FastslimValueError(
                        f"{cls.__name__} has no argument {key!r}: {errors.nearest(key, known)}"
                    )
            constructor(self, *args, **kwargs)

        setattr(cls, "__init__", checked)  # noqa: B010
        return cls

    return decorate
