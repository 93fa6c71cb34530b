"""Flags made from the fields of `TrainConfig`, so that YAML and command line can't differ."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import click

from fastslim.engine.config import TrainConfig
from fastslim.engine.options import expected_type


class Listed(click.ParamType):
    """Values with commas between them: ``0.25,0.5,1``; an empty string is the empty list."""

    name = "a,b,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Splits; `TrainConfig` checks the values."""
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds a flag for each option of `TrainConfig`; a flag that is not given arrives as None."""
    for entry in reversed(dataclasses.fields(TrainConfig)):
        command = config_option(entry)(command)
    return command


def config_option(entry: dataclasses.Field[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The flag of one option."""
    kind, _ = expected_type(TrainConfig, entry)
    flag = f"--{entry.name.replace('_', '-')}"
    text = f"{entry.metadata['help']} [{show(entry.default)}]"
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", entry.name, default=None, help=text)
    if typing.get_origin(kind) is tuple:
        return click.option(flag, entry.name, type=Listed(), default=None, help=text)
    among = entry.metadata["among"]
    return click.option(flag, entry.name, type=click.Choice(among) if among else kind, default=None, help=text)


def show(default: Any) -> str:
    """A default as one would type it."""
    if isinstance(default, tuple):
        values = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in default]
        return ",".join(values if len(values) < 6 else [*values[:2], "...", values[-1]]) or "none"
    if default is None:
        return "unset"
    return str(default).lower() if isinstance(default, bool) else str(default)
