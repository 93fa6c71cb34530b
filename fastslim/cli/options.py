"""Flags made from the fields of `Options`, so that YAML and command line can't differ."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import click

from fastslim.engine.options import Numbers, Options, expected_type, read_yaml

Some = TypeVar("Some", bound=Options)
STOPPED_BY_SIGNAL = 130


class Listed(click.ParamType):
    """Values with commas between them: ``0.25,0.5,1``; an empty string is the empty list."""

    name = "a,b,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Splits; `Options` check the values."""
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def option_flags(
    kind: type[Options], without: Collection[str] = (), default: Callable[[dataclasses.Field[Any]], str] | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Decorator that adds a flag for each option; a flag that is not given arrives as None or ().

    Args:
        kind: whose fields become flags.
        without: fields that do not.
        default: what the help says about an option's default; the default itself when None.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for entry in reversed(dataclasses.fields(kind)):
            if entry.name not in without:
                text = show(kind.default(entry)) if default is None else default(entry)
                command = option_flag(kind, entry, text)(command)
        return command

    return decorate


def option_flag(
    owner: type[Options], entry: dataclasses.Field[Any], default: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The flag of one option."""
    kind, _ = expected_type(owner, entry)
    flag = f"--{entry.name.replace('_', '-')}"
    text = f"{entry.metadata['help']} [{default}]"
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", entry.name, default=None, help=text)
    if kind == Numbers:
        return click.option(flag, entry.name, multiple=True, metavar="NAME=a,b,...", help=text)
    if typing.get_origin(kind) is tuple:
        return click.option(flag, entry.name, type=Listed(), default=None, help=text)
    among = entry.metadata["among"]
    return click.option(flag, entry.name, type=click.Choice(among) if among else kind, default=None, help=text)


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given."""
    return {
        key: list(value) if value.__class__ is tuple else value
        for key, value in flags.items()
        if value not in (None, ())
    }


def options_from(kind: type[Some], config: Path | None, flags: dict[str, Any], saved: Some | None = None) -> Some:
    """The options of a YAML file, or those that were saved before, overridden by flags."""
    if config is not None:
        return kind.from_file(config, **given(flags))
    return saved.replace(**given(flags)) if saved is not None else kind.from_mapping(given(flags), "the flags")


def values_from(config: Path | None, flags: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What a YAML file and the flags say, and where it comes from."""
    return {**(read_yaml(config) if config else {}), **given(flags)}, str(config) if config else "the flags"


config_option = click.option(
    "--config", type=click.Path(path_type=Path), help="YAML file with the options below as keys. Flags override it."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what is there.")
resume_option = click.option("--resume", is_flag=True, help="Go on with what is there; begin if there is nothing.")
run_argument = click.argument("run", type=click.Path(path_type=Path))


def show(default: Any) -> str:
    """A default as one would type it."""
    if isinstance(default, tuple):
        values = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in default]
        return ",".join(values if len(values) < 6 else [*values[:2], "...", values[-1]]) or "none"
    if default is None or default in ("", {}):
        return "unset"
    return str(default).lower() if isinstance(default, bool) else str(default)
