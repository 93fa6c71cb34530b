"""A small registry: classes by name, so that a config dict can say what to build."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from fastslim import errors

_Registered = TypeVar("_Registered", bound=Callable[..., Any])

# Scopes a type may be written with. MMRazor's names mean our classes only where MMRazor is not there itself.
_OWN_SCOPE = "fastslim"
_FOREIGN_SCOPE = "mmrazor"


class Registry:
    """Builds objects from dicts such as ``dict(type="KLDivergence", tau=2.0)``.

    Args:
        name: what the registry holds, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._classes: dict[str, Callable[..., Any]] = {}

    def register_module(
        self, name: str | None = None, *, module: _Registered | None = None, force: bool = False
    ) -> Any:
        """Registers a class (or any callable that builds something), as a decorator or by a call.

        Args:
            name: the name to build it by; its own by default.
            module: what to register; without it, a decorator is returned.
            force: replace what has that name already.

        Raises:
            FastslimTypeError: `name` is no string (``@MODELS.register_module`` without parentheses).
            FastslimValueError: the name is taken.
        """
        if name is not None and not isinstance(name, str):
            raise errors.FastslimTypeError(
                f"a name should be a string, but got {name!r}; write @{self.name}.register_module() with parentheses"
            )

        def register(target: _Registered) -> _Registered:
            key = name or target.__name__
            if not force and self._classes.get(key, target) is not target:
                raise errors.FastslimValueError(
                    f"{key!r} is registered in {self.name} already ({self._classes[key]}); "
                    "choose another name or pass force=True"
                )
            self._classes[key] = target
            return target

        return register if module is None else register(module)

    def get(self, name: str) -> Callable[..., Any] | None:
        """What is registered as `name`, with or without a scope in front; None if nothing is."""
        return self._classes.get(self._without_scope(name))

    def build(self, config: Mapping[str, Any], **defaults: Any) -> Any:
        """Builds what a config dict describes; the dict is not changed.

        Args:
            config: ``type`` is a registered name, with an optional scope (``"fastslim.KLDivergence"``), or a
                class; the other keys are its arguments.
            **defaults: arguments the config may override.

        Raises:
            FastslimTypeError: `config` is no dict, or its type neither a string nor a class.
            FastslimValueError: no or an unknown type, or arguments that the class does not have.
        """
        if not isinstance(config, Mapping):
            raise errors.FastslimTypeError(
                f"a config should be a dict such as dict(type=...), but got {type(config).__name__}: {config!r}"
            )
        arguments = {**defaults, **config}
        if "type" not in arguments:
            raise errors.FastslimValueError(f"a config needs a key 'type' that says what to build: {dict(config)!r}")
        target = self._resolve(arguments.pop("type"))
        _check_arguments(target, arguments)
        return target(**arguments)

    def _resolve(self, kind: Any) -> Callable[..., Any]:
        if isinstance(kind, str):
            target = self.get(kind)
            if target is None:
                raise errors.FastslimValueError(
                    f"{kind!r} is not registered in {self.name}: "
                    f"{errors.nearest(self._without_scope(kind), self._classes)}; "
                    f"a class of your own needs @{self.name}.register_module() and its file imported"
                )
            return target
        if not callable(kind):
            raise errors.FastslimTypeError(f"'type' should be a registered name or a class, but got {kind!r}")
        return kind

    def _without_scope(self, name: str) -> str:
        scope, _, rest = name.partition(".")
        if rest and (scope == _OWN_SCOPE or (scope == _FOREIGN_SCOPE and not _is_installed(_FOREIGN_SCOPE))):
            return rest
        return name

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._classes))

    def __len__(self) -> int:
        return len(self._classes)

    def __repr__(self) -> str:
        return f"Registry({self.name}: {', '.join(self)})"


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _check_arguments(target: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Refuses unknown and missing arguments with their names, before the constructor starts."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # some builtins have none; their own error must do
        return
    name = getattr(target, "__name__", repr(target))
    parameters = signature.parameters.values()
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key in arguments:
            if key not in known:
                raise errors.FastslimValueError(f"{name} has no argument {key!r}: {errors.nearest(key, known)}")
    required = [p.name for p in parameters if p.default is p.empty and p.name in known]
    missing = [key for key in required if key not in arguments]
    if missing:
        raise errors.FastslimValueError(f"{name} needs {', '.join(map(repr, missing))}: add it to the config")


#: Everything a config of fastslim can name: algorithms, mutators, units, distillers, recorders, losses, your models.
MODELS = Registry("MODELS")
