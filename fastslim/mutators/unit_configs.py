"""What `channel_unit_cfg` may be: a class, its name, a dict, a list of subnets, or a file that holds one of these."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastslim.errors import FastslimFileError, FastslimRuntimeError, FastslimTypeError, FastslimValueError, nearest
from fastslim.mutators.one_shot_units import unit_type
from fastslim.mutators.units import SequentialMutableChannelUnit

_KEYS = ("type", "default_args", "units")
_UNIT_KEYS = ("init_args", "channels", "choice")
_ENDINGS = (".json", ".yaml", ".yml")


@dataclass
class UnitConfigs:
    """A parsed `channel_unit_cfg`.

    Attributes:
        unit_class: of all units.
        default_args: of every unit.
        units: what is said of single units, by name: ``init_args``, ``channels`` and ``choice``.
        parse_cfg: of the mutator whose template was given as a whole.
    """

    unit_class: type[SequentialMutableChannelUnit]
    default_args: dict[str, Any] = field(default_factory=dict)
    units: dict[str, dict[str, Any]] = field(default_factory=dict)
    parse_cfg: Mapping[str, Any] | None = None


def parse_unit_configs(config: Any, default: Mapping[str, Any]) -> UnitConfigs:
    """Brings a `channel_unit_cfg` into one form.

    Args:
        config: a unit class or its registered name; ``dict(type=, default_args=, units=)`` where `units` is a dict by
            unit name or the path of a file with one; a whole template as `config_template` writes it; a list of
            subnets (dicts from unit name to width); or the path of a JSON or YAML file with any of these, or with the
            units alone, as MMRazor's files are.
        default: what None means.

    Raises:
        FastslimTypeError: for anything else.
        FastslimValueError: for unknown keys and names.
        FastslimFileError: for a file that cannot be read.
    """
    config = default if config is None else config
    if isinstance(config, Path) or (isinstance(config, str) and config.endswith(_ENDINGS)):
        config = _of_file(config, default)
    if isinstance(config, (list, tuple)):
        config = _of_subnets(config)
    parse_cfg = None
    if isinstance(config, Mapping) and "channel_unit_cfg" in config:
        parse_cfg, config = config.get("parse_cfg"), config["channel_unit_cfg"]
    if not isinstance(config, Mapping):
        return UnitConfigs(unit_type(config))
    for key in config:
        if key not in _KEYS:
            raise FastslimValueError(f"channel_unit_cfg has no key {key!r}; {nearest(str(key), _KEYS)}")
    if "type" not in config:
        raise FastslimValueError("channel_unit_cfg needs a type, such as 'OneShotMutableChannelUnit'")
    units = config.get("units", {})
    if isinstance(units, (str, Path)):
        units = read_config(units, "units")
    default_args = config.get("default_args", {})
    for name, value in (("units", units), ("default_args", default_args)):
        if not isinstance(value, Mapping):
            raise FastslimTypeError(f"channel_unit_cfg's {name} must be a dict, got {type(value).__name__}")
    return UnitConfigs(unit_type(config["type"]), dict(default_args), _checked(units), parse_cfg)


def _checked(units: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    for name, unit in units.items():
        if not isinstance(unit, Mapping):
            raise FastslimTypeError(f"the config of unit {name!r} must be a dict, got {type(unit).__name__}")
        for key in unit:
            if key not in _UNIT_KEYS:
                raise FastslimValueError(
                    f"the config of unit {name!r} has no key {key!r}; {nearest(str(key), _UNIT_KEYS)}"
                )
    return {name: dict(unit) for name, unit in units.items()}


def _of_file(path: str | Path, default: Mapping[str, Any]) -> Any:
    config = read_config(path, "channel_unit_cfg")
    if isinstance(config, Mapping) and "type" not in config and "channel_unit_cfg" not in config:
        return dict(type=default["type"], units=config)  # the units alone, as MMRazor's files are
    return config


def _of_subnets(subnets: Sequence[Any]) -> dict[str, Any]:
    if not subnets or not all(isinstance(s, Mapping) and s.keys() == subnets[0].keys() for s in subnets):
        raise FastslimValueError("a list of subnets must hold dicts from unit name to width, all with the same units")
    number = all(isinstance(width, int) for subnet in subnets for width in subnet.values())
    mode = "number" if number else "ratio"
    return dict(
        type="SlimmableChannelUnit",
        default_args=dict(candidate_choices=[1.0], choice_mode="ratio"),
        units={
            name: dict(init_args=dict(candidate_choices=[subnet[name] for subnet in subnets], choice_mode=mode))
            for name in subnets[0]
        },
    )


def read_config(path: str | Path, what: str) -> Any:
    """The plain values in a JSON or YAML file.

    Args:
        path: ends in .json, .yaml or .yml.
        what: what it is for, in messages.

    Raises:
        FastslimFileError: it cannot be read, or holds something else.
        FastslimRuntimeError: YAML is not installed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FastslimFileError(f"{what} {str(path)!r} cannot be read: {reason}") from error
    if path.suffix not in (".yaml", ".yml"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise FastslimFileError(f"{what} {str(path)!r} is no JSON: {error}") from error
    try:
        import yaml
    except ImportError as error:
        raise FastslimRuntimeError("reading YAML needs pyyaml: pip install pyyaml, or write JSON") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise FastslimFileError(f"{what} {str(path)!r} is no YAML: {error}") from error
