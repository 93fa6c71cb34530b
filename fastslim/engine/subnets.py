"""The subnets of a run by name: what its search found, uniform widths, and files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastslim.algorithms import AutoSlim
from fastslim.cost.source import widths_of
from fastslim.engine.options import read_yaml
from fastslim.errors import FastslimError, FastslimFileError, FastslimValueError, nearest
from fastslim.export import load_subnet
from fastslim.search import FoundSubnet, SearchReport

DESCRIPTION = "subnet.json"


@dataclass(frozen=True)
class ChosenSubnet:
    """A subnet that a user named.

    Attributes:
        name: for tables and files.
        choices: width of every mutable unit.
        network: with weights of its own, where a file brings them; else the supernet's are meant.
    """

    name: str
    choices: dict[str, int]
    network: nn.Module | None = None


def found_name(found: FoundSubnet) -> str:
    """How a subnet of a search is called: ``flops-0.5``."""
    return f"{found.cost}-{found.budget:g}"


def found_subnets(run: Path) -> dict[str, dict[str, int]]:
    """What the search of a run found, by name; nothing where there was none, or it is not finished.

    Raises:
        FastslimFileError: its report is damaged.
    """
    report = run / "search" / "report.json"
    if not report.is_file():
        return {}
    return {found_name(found): dict(found.subnet) for found in SearchReport.load(report).found}


def choose_subnet(run: Path, algo: AutoSlim, text: str) -> ChosenSubnet:
    """The subnet that is meant.

    Args:
        run: the run's folder.
        algo: its supernet.
        text: a name that the search gave, ``width-0.5``, a folder that `fastslim.export.save_subnet` wrote (its
            weights count), a JSON or YAML file with the width of each unit, or ``retrain/NAME``.

    Raises:
        FastslimFileError: a file of something else, or of another network.
        FastslimValueError: there is no such subnet; the nearest name is given.
    """
    found = found_subnets(run)
    if text in found:
        return ChosenSubnet(text, checked(algo, found[text], run / "search" / "report.json"))
    path = subnet_path(run, text)
    if path is not None and path.is_dir():
        network = load_subnet(path, algo)
        name = f"{path.parent.name}-retrained" if path.name == "subnet" else path.name
        return ChosenSubnet(name, dict(load_subnet(path)), network.to(next(algo.parameters()).device))
    if path is not None:
        return ChosenSubnet(path.stem, checked(algo, read_widths(path), path))
    if text.startswith("width-"):
        return uniform(algo, text.removeprefix("width-"))
    known = [*found, "width-0.5"]
    where = "" if found else f"; `fastslim search {run}` has found none yet"
    raise FastslimValueError(f"there is no subnet or file {text!r}: {nearest(text, known)}{where}")


def subnet_key(run: Path, text: str) -> Any:
    """What a name stands for at the moment, without the supernet: to see whether it still means the same."""
    found = found_subnets(run)
    path = None if text in found else subnet_path(run, text)
    if path is None:
        return found.get(text, text)
    return dict(load_subnet(path)) if path.is_dir() else read_widths(path)


def subnet_path(run: Path, text: str) -> Path | None:
    """The folder of a saved subnet or the file of widths that a text names, seen from here or from the run."""
    for path in (Path(text), run / text, Path(text) / "subnet", run / text / "subnet"):
        if path.is_file() or (path / DESCRIPTION).is_file():
            return path
    if Path(text).exists():
        raise FastslimFileError(f"{text} holds no subnet: `fastslim export` writes folders with a {DESCRIPTION}")
    return None


def read_widths(path: Path) -> dict[str, Any]:
    """Widths by unit name from a JSON or YAML file.

    Raises:
        FastslimFileError: it holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else read_yaml(path)
    except (ValueError, OSError) as error:
        raise FastslimFileError(f"{path} is no file of widths: {error}") from error
    if not isinstance(values, Mapping) or not values:
        raise FastslimFileError(f"{path} must hold the width of each unit, such as {{'conv1_(0, 16)_16': 8}}")
    return dict(values)


def uniform(algo: AutoSlim, ratio: str | float) -> ChosenSubnet:
    """Every unit at a ratio of its channels.

    Raises:
        FastslimValueError: it is none.
    """
    try:
        width = float(ratio)
    except ValueError as error:
        raise FastslimValueError(f"width-{ratio}: the width is a ratio such as width-0.5") from error
    if not 0 < width <= 1:
        raise FastslimValueError(f"width {width:g} is not a ratio above 0 and up to 1")
    return ChosenSubnet(f"width-{width:g}", algo.uniform_subnet(width))


def checked(algo: AutoSlim, subnet: Mapping[str, Any], path: Path) -> dict[str, int]:
    """The widths of all mutable units; one that a file does not mention is at full width.

    Raises:
        FastslimFileError: units or widths that this network does not have.
    """
    try:
        return {**algo.mutator.max_choices, **widths_of(algo.mutator, subnet)}
    except FastslimError as error:
        raise FastslimFileError(f"{path} holds the subnet of another network: {error}") from error
