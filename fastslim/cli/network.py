"""A network of the user's, named on the command line, and what it is called with."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from fastslim.cli.options import Listed

if TYPE_CHECKING:
    from torch import nn

    from fastslim.graph import Report

_OPTIONS = [
    click.option(
        "--input-shape", type=Listed(), metavar="N,C,H,W", help="Shape of the network's input, such as 1,3,224,224."
    ),
    click.option(
        "--inputs",
        "inputs_name",
        metavar="MODULE:FUNCTION",
        help="Instead of --input-shape: returns a tensor, a tuple of arguments or a dict of keyword arguments.",
    ),
    click.option(
        "--kwargs",
        multiple=True,
        metavar="NAME=VALUE",
        help="Argument of the function, may be repeated; VALUE is a Python literal or plain text.",
    ),
    click.option("--include", multiple=True, metavar="PATTERN", help="Only channels made in these modules may change."),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Channels of these modules stay full."),
    click.option("--choices", type=Listed(), help="Ratios of the full width. [2/12, 3/12 ... 1]"),
    click.option("--divisor", type=int, default=8, show_default=True, help="Widths are multiples of it."),
]


def network_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds the options `convert_network` takes."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def convert_network(
    name: str,
    *,
    input_shape: list[str] | None,
    inputs_name: str | None,
    kwargs: Sequence[str],
    include: Sequence[str],
    exclude: Sequence[str],
    choices: list[str] | None,
    divisor: int,
) -> Report:
    """Builds the network that ``module:function`` returns and converts it."""
    from fastslim.mutators import convert

    example = example_inputs(input_shape, inputs_name)
    network = build_network(name, parse_kwargs(kwargs))
    return convert(network, example, choices=width_ratios(choices), divisor=divisor, include=include, exclude=exclude)


def example_inputs(input_shape: list[str] | None, inputs_name: str | None) -> Any:
    """What a network is called with: a shape, or what a function returns.

    Raises:
        FastslimValueError: neither is given, or both are.
    """
    from fastslim.errors import FastslimValueError

    if (input_shape is None) == (inputs_name is None):
        raise FastslimValueError("give either --input-shape 1,3,224,224 or --inputs module:function")
    if inputs_name is not None:
        return call_by_name(inputs_name, {})
    return tuple(_number(size, int, "--input-shape") for size in input_shape or ())


def width_ratios(choices: list[str] | None) -> list[float] | None:
    """Ratios of the full width, where they are given."""
    return [_number(choice, float, "--choices") for choice in choices] if choices else None


def build_network(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """The network behind ``module:function``.

    Raises:
        FastslimTypeError: when the function returns something else.
    """
    from torch import nn

    from fastslim.errors import FastslimTypeError

    network = call_by_name(name, kwargs)
    if not isinstance(network, nn.Module):
        raise FastslimTypeError(f"{name} must return a torch.nn.Module, but returned a {type(network).__name__}")
    return network


def call_by_name(name: str, kwargs: dict[str, Any]) -> Any:
    """What ``module:function`` returns; modules in the current folder are found.

    Raises:
        FastslimValueError: no such module or function, or arguments that do not fit it.
        FastslimRuntimeError: the module or the function fails.
    """
    from torch import nn

    from fastslim.data import import_function
    from fastslim.errors import FastslimError, FastslimRuntimeError, FastslimValueError

    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise FastslimValueError(f"{name!r} is not of the form module:function, such as fastslim.models:resnet18")
    try:
        function = import_function(name)
    except FastslimError:
        raise
    except Exception as error:
        raise FastslimRuntimeError(f"importing {module!r} failed: {type(error).__name__}: {error}") from error
    if isinstance(function, nn.Module):
        return function
    try:
        inspect.signature(function).bind(**kwargs)
    except TypeError as error:
        raise FastslimValueError(
            f"{name}{inspect.signature(function)} cannot be called like this: {error}; "
            "give its arguments with --kwargs NAME=VALUE"
        ) from error
    except ValueError:
        pass  # a builtin without a signature
    try:
        return function(**kwargs)
    except FastslimError:
        raise
    except Exception as error:
        raise FastslimRuntimeError(
            f"{name} failed: {type(error).__name__}: {error}; fastslim --debug ... shows where"
        ) from error


def parse_kwargs(texts: Sequence[str]) -> dict[str, Any]:
    """``["depth=4", "name=tiny"]`` -> ``{"depth": 4, "name": "tiny"}``.

    Raises:
        FastslimValueError: a text without ``=``, or true, false, none or null, which Python writes differently.
    """
    from fastslim.errors import FastslimValueError

    python = {"true": "True", "false": "False", "none": "None", "null": "None"}
    kwargs: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise FastslimValueError(f"--kwargs {text!r} is not of the form NAME=VALUE, such as num_classes=10")
        if value in python:
            raise FastslimValueError(f"--kwargs {text}: write {key}={python[value]}, or {key}=\"'{value}'\" for text")
        try:
            kwargs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[key] = value
    return kwargs


def _number(text: str, kind: type, option: str) -> Any:
    from fastslim.errors import FastslimValueError

    try:
        return kind(text)
    except ValueError as error:
        raise FastslimValueError(f"{option} takes numbers with commas between them, got {text!r}") from error
