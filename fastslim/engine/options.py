"""`Options`: what a command takes, as a checked dataclass; from YAML, from flags and back to YAML."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from fastslim.errors import FastslimFileError, FastslimRuntimeError, FastslimTypeError, FastslimValueError, nearest
from fastslim.files import write_atomically

Some = TypeVar("Some", bound="Options")
#: Numbers by name, such as budgets: ``{"flops": (0.5, 0.25)}``.
Numbers = dict[str, tuple[float, ...]]


def option(default: Any, help: str, *, among: tuple[str, ...] = (), low: float | None = None) -> Any:
    """A field with the sentence `--help` shows, its allowed values and its smallest value."""
    metadata = {"help": help, "among": among, "low": low}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """A command's options; each field is a YAML key and, with dashes, a flag."""

    #: These change how something is carried out and shown, not what comes out of it.
    NOT_PART_OF_THE_RESULT: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            object.__setattr__(self, entry.name, check_value(type(self), entry, getattr(self, entry.name)))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON hold them."""
        return {key: _plain(value) for key, value in dataclasses.asdict(self).items()}

    def replace(self: Some, **changes: Any) -> Some:
        """A copy with some options changed, checked like the original."""
        return type(self).from_mapping({**self.as_dict(), **changes}, "the flags")

    def save(self, path: Path) -> None:
        """Writes YAML that reads back to an equal object."""
        write_atomically(path, import_yaml().safe_dump(self.as_dict(), sort_keys=False, default_flow_style=None))

    @classmethod
    def from_mapping(cls: type[Some], values: Mapping[str, Any], source: str) -> Some:
        """Options from plain values.

        Args:
            values: by name.
            source: where they come from, for messages.

        Raises:
            FastslimValueError: an unknown key (the nearest known one is named) or an impossible value.
            FastslimTypeError: a value of the wrong type.
        """
        known = [entry.name for entry in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise FastslimValueError(f"unknown key {key!r} in {source}: {nearest(key, known)}")
        return cls(**values)

    @classmethod
    def from_file(cls: type[Some], path: Path, **changes: Any) -> Some:
        """Options of a YAML file; ``changes`` override what it says.

        Raises:
            FastslimFileError: no such file, or it cannot be read.
            FastslimValueError: not YAML, a tag that would build an object, an unknown key, an impossible value.
            FastslimTypeError: a value of the wrong type.
        """
        return cls.from_mapping({**read_yaml(path), **changes}, str(path))

    @classmethod
    def default(cls, entry: dataclasses.Field[Any]) -> Any:
        """The value of an option that is not given."""
        return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


def differences(first: Options, second: Options) -> list[str]:
    """Options that change the result and differ, as ``name: first there, second here``."""
    ours, theirs = first.as_dict(), second.as_dict()
    return [
        f"{key}: {ours[key]!r} there, {theirs.get(key)!r} here"
        for key in ours
        if key not in first.NOT_PART_OF_THE_RESULT and ours[key] != theirs.get(key)
    ]


def expected_type(owner: type[Options], entry: dataclasses.Field[Any]) -> tuple[Any, bool]:
    """The type of an option's values (of its items, for a tuple), and whether it may be unset."""
    hint = typing.get_type_hints(owner)[entry.name]
    if isinstance(hint, types.UnionType):
        return next(kind for kind in hint.__args__ if kind is not type(None)), True
    return hint, False


def check_value(owner: type[Options], entry: dataclasses.Field[Any], value: Any) -> Any:
    """The value in its proper type, or an error that names the option."""
    kind, may_be_unset = expected_type(owner, entry)
    if value is None and may_be_unset:
        return None
    among, low = entry.metadata["among"], entry.metadata["low"]
    if kind == Numbers:
        return check_numbers(entry.name, value)
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        values = value if isinstance(value, list | tuple) else [value]
        checked = tuple(check_scalar(entry.name, each, item) for each in values)
        for each in checked if among else ():
            check_among(entry.name, each, among)
        return checked
    value = check_scalar(entry.name, value, kind)
    if among:
        check_among(entry.name, value, among)
    if low is not None and value < low:
        raise FastslimValueError(f"{entry.name}={value}: must be at least {low}")
    return value


def check_among(name: str, value: str, among: tuple[str, ...]) -> None:
    """Raises FastslimValueError unless the value is one of those allowed."""
    if value not in among:
        raise FastslimValueError(f"{name}: {value!r} is not possible: {nearest(value, among)}")


def check_numbers(name: str, value: Any) -> Numbers:
    """Numbers by name, from a mapping or from texts such as ``flops=0.5,0.25``.

    Raises:
        FastslimTypeError: something else.
    """
    if isinstance(value, Mapping):
        pairs: list[tuple[Any, Any]] = list(value.items())
    else:
        texts = value if isinstance(value, list | tuple) else [value]
        for text in texts:
            if not isinstance(text, str) or "=" not in text:
                raise FastslimTypeError(f"{name} takes names with numbers, such as flops=0.5,0.25, not {text!r}")
        pairs = [(text.partition("=")[0], text.partition("=")[2]) for text in texts]
    numbers: Numbers = {}
    for key, values in pairs:
        listed = values.split(",") if isinstance(values, str) else values
        listed = listed if isinstance(listed, list | tuple) else [listed]
        checked = tuple(check_scalar(f"{name} {key}", each, float) for each in listed)
        numbers[str(key).strip()] = (*numbers.get(str(key).strip(), ()), *checked)
    return numbers


def check_scalar(name: str, value: Any, kind: type) -> Any:
    """One value as ``kind``; YAML reads ``1e-3`` as a string, which is a number all the same."""
    if kind is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if number == number:
            return number
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    raise FastslimTypeError(f"{name} must be {words[kind]}, not {value!r} ({type(value).__name__})")


def read_yaml(path: Path) -> dict[str, Any]:
    """The ``key: value`` lines of a file; none where it is empty.

    Raises:
        FastslimFileError: no such file, or it cannot be read.
        FastslimValueError: not YAML, a tag that would build an object, or something else than keys and values.
    """
    yaml = import_yaml()
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FastslimFileError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise FastslimValueError(f"{path}{line} is not plain YAML: {problem}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise FastslimValueError(f"{path} must hold 'key: value' lines, not a {type(values).__name__}")
    return values


def import_yaml() -> Any:
    """PyYAML, or one sentence on how to get it."""
    try:
        import yaml
    except ImportError as error:
        raise FastslimRuntimeError("configuration files need PyYAML: pip install 'fastslim[cli]'") from error
    return yaml


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
