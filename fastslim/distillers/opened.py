"""What recorders and deliveries share: built from a config, open inside a `with` block, closed in a copy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from fastslim import errors
from fastslim.registry import MODELS

Self = TypeVar("Self", bound="Opened")


class Opened:
    """Something that holds other contexts open inside its ``with`` block."""

    #: What it does while it is open, for messages.
    _doing: ClassVar[str] = "open"
    _open: contextlib.ExitStack | None = None

    def contexts(self) -> Iterable[contextlib.AbstractContextManager[Any]]:
        """What the block holds open; asked for once, when it begins."""
        raise NotImplementedError(f"{type(self).__name__} must say what it opens")

    def __enter__(self: Self) -> Self:
        if self._open is not None:
            raise errors.FastslimRuntimeError(f"{self} is {self._doing} already: leave its `with` block first")
        with contextlib.ExitStack() as stack:
            for context in self.contexts():
                stack.enter_context(context)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        stack, self._open = self._open, None
        if stack is not None:
            stack.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}


def build_named(given: Any, kind: type[Any], ending: str) -> Any:
    """An object of a kind, or what its config describes; the type may be written without the kind's `ending`.

    Raises:
        FastslimTypeError: neither such an object nor the config of one.
    """
    part = given
    if isinstance(given, Mapping):
        config = dict(given)
        name = config.get("type")
        if isinstance(name, str) and not name.endswith(ending):
            config["type"] = name + ending
        part = MODELS.build(config)
    if not isinstance(part, kind):
        raise errors.FastslimTypeError(
            f"a {ending.lower()} should be a {kind.__name__} or its config, but got {type(part).__name__}"
        )
    return part
