"""A small registry: classes by name, so that a config dict can say what to build."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

from fastslim import errors

_Registered = TypeVar("_Registered", bound=Callable[..., Any])

# Scopes a type may be written with. MMRazor's names mean our classes only where MMRazor is not there itself.
_OWN_SCOPE = "fastslim"
_FOREIGN_SCOPE = "mmrazor"


class Parent(Protocol):
    """Who is asked for names that a registry does not have: a framework's registry, behind an integration."""

    def get(self, name: str, scope: str | None = None) -> Callable[..., Any] | None:
        """What the framework knows by this name, or None."""

    def build(self, config: dict[str, Any]) -> Any:
        """Builds what :meth:`get` finds, the framework's way."""

    def names(self) -> Iterable[str]:
        """What it knows, for messages."""


class Registry:
    """Builds objects from dicts such as ``dict(type="KLDivergence", tau=2.0)``.

    Args:
        name: what the registry holds, for messages.

    Attributes:
        parent: asked for names that are not here; set by an integration, None without one.
    """

    scope = _OWN_SCOPE

    def __init__(self, name: str) -> None:
        self.name = name
        self.parent: Parent | None = None
        self._classes: dict[str, Callable[..., Any]] = {}

    @property
    def module_dict(self) -> dict[str, Callable[..., Any]]:
        """What is registered here, by name."""
        return self._classes

    def register_module(
        self, name: str | list[str] | None = None, force: bool = False, module: _Registered | None = None
    ) -> Any:
        """Registers a class (or any callable that builds something), as a decorator or by a call.

        Args:
            name: the name to build it by, or several; its own by default.
            force: replace what has that name already.
            module: what to register; without it, a decorator is returned.

        Raises:
            FastslimTypeError: `name` is no string (``@MODELS.register_module`` without parentheses).
            FastslimValueError: the name is taken.
        """
        names = [name] if name is None or isinstance(name, str) else name
        if not isinstance(names, (list, tuple)) or not all(n is None or isinstance(n, str) for n in names):
            raise errors.FastslimTypeError(
                f"a name should be a string or a list of them, but got {name!r}; write @{self.name}.register_module() "
                "with parentheses"
            )

        def register(target: _Registered) -> _Registered:
            keys = [key or target.__name__ for key in names]
            for key in keys:
                if not force and self._classes.get(key, target) is not target:
                    raise errors.FastslimValueError(
                        f"{key!r} is registered in {self.name} already ({self._classes[key]}); "
                        "choose another name or pass force=True"
                    )
            self._classes.update(dict.fromkeys(keys, target))
            return target

        return register if module is None else register(module)

    def get(self, name: str) -> Callable[..., Any] | None:
        """What is registered as `name`, with or without a scope in front, here or at the parent; None if nothing is."""
        target = self._classes.get(without_scope(name))
        return self.parent.get(name) if target is None and self.parent is not None else target

    def build(self, config: Mapping[str, Any], default_args: Mapping[str, Any] | None = None, **defaults: Any) -> Any:
        """Builds what a config dict describes; the dict is not changed.

        Args:
            config: ``type`` is a registered name, with an optional scope (``"fastslim.KLDivergence"``), or a
                class; the other keys are its arguments. ``_scope_`` says whose names the dict is written in.
            default_args: arguments the config may override.
            **defaults: the same as keywords.

        Raises:
            FastslimTypeError: `config` is no dict, or its type neither a string nor a class.
            FastslimValueError: no or an unknown type, or arguments that the class does not have.
        """
        if not hasattr(config, "keys"):
            raise errors.FastslimTypeError(
                f"a config should be a dict such as dict(type=...), but got {type(config).__name__}: {config!r}"
            )
        arguments = {**defaults, **(default_args or {}), **{key: config[key] for key in config}}
        scope = arguments.pop("_scope_", None)
        if "type" not in arguments:
            raise errors.FastslimValueError(f"a config needs a key 'type' that says what to build: {dict(config)!r}")
        kind = arguments.pop("type")
        if isinstance(kind, str):
            target = self._classes.get(without_scope(kind)) if _is_ours(scope) else None
            if target is None:
                return self._build_by_parent(kind, scope, arguments)
        elif callable(kind):
            target = kind
        else:
            raise errors.FastslimTypeError(f"'type' should be a registered name or a class, but got {kind!r}")
        check_arguments(target, arguments)
        return target(**arguments)

    def _build_by_parent(self, kind: str, scope: str | None, arguments: Mapping[str, Any]) -> Any:
        target = None if self.parent is None else self.parent.get(kind, scope)
        if target is None:
            known = [*self._classes, *([] if self.parent is None else self.parent.names())]
            other = kind.partition(".")[0] if "." in kind and not _is_ours(kind.partition(".")[0]) else scope
            raise errors.FastslimValueError(
                f"{kind!r} is not registered in {self.name}"
                + (f" or in the scope {other!r}" if not _is_ours(other) else "")
                + f": {errors.nearest(without_scope(kind).rpartition('.')[2], known)}; "
                f"a class of your own needs @{self.name}.register_module() and its file imported"
                + ("" if self.parent else ", a class of an OpenMMLab library `import fastslim.integrations.mmengine`")
            )
        check_arguments(target, arguments)
        return self.parent.build({"type": kind, **({} if scope is None else {"_scope_": scope}), **arguments})

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._classes))

    def __len__(self) -> int:
        return len(self._classes)

    def __repr__(self) -> str:
        return f"Registry({self.name}: {', '.join(self)})"


def own_scopes() -> tuple[str, ...]:
    """The scopes that mean our classes: "fastslim", and "mmrazor" where MMRazor is not installed."""
    return (_OWN_SCOPE,) if _is_installed(_FOREIGN_SCOPE) else (_OWN_SCOPE, _FOREIGN_SCOPE)


def without_scope(name: str) -> str:
    """A type's name without a scope of ours in front; other scopes stay."""
    scope, _, rest = name.partition(".")
    return rest if rest and _is_ours(scope) else name


def _is_ours(scope: str | None) -> bool:
    return scope is None or scope == _OWN_SCOPE or (scope == _FOREIGN_SCOPE and not _is_installed(_FOREIGN_SCOPE))


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def check_arguments(target: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Refuses unknown and missing arguments with their names, before the constructor starts.

    Raises:
        FastslimValueError: names the argument, and the nearest one there is.
    """
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

# MMRazor 0.x has a registry for each kind of part.
ALGORITHMS = MUTATORS = PRUNERS = DISTILLERS = LOSSES = MODELS
