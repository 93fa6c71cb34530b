"""`loss_forward_mappings`: which record becomes which argument of a loss, checked before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from fastslim import errors
from fastslim.contract_errors import AssertedValueError

Config = Mapping[str, Any]
_RECORD_KEYS = ("recorder", "from_student", "record_idx", "data_idx", "connector", "connector_idx")
_RECORD_FORM = "a dict such as dict(recorder='fc', from_student=True)"


class Names(NamedTuple):
    """What a mapping may refer to."""

    students: Iterable[str]
    teachers: Iterable[str]
    connectors: Iterable[str]


def default_mappings(losses: Mapping[str, nn.Module], names: Names) -> dict[str, dict[str, Config]]:
    """Every loss compares the student's only record, its first argument, with the teacher's, its second.

    Raises:
        FastslimValueError: there are several recorders, or a loss has fewer arguments.
    """
    if not losses:
        return {}
    students, teachers = list(names.students), list(names.teachers)
    if len(students) != 1 or len(teachers) != 1:
        raise errors.FastslimValueError(
            f"with {len(students)} student and {len(teachers)} teacher recorders it is not clear what the losses "
            "compare: give loss_forward_mappings=dict(<loss>=dict(preds_S=dict(recorder=..., from_student=True), "
            "preds_T=dict(recorder=..., from_student=False)))"
        )
    mappings: dict[str, dict[str, Config]] = {}
    for name, loss in losses.items():
        arguments = list(inspect.signature(loss.forward).parameters)
        if len(arguments) < 2:
            raise errors.FastslimValueError(
                f"{name}: {type(loss).__name__}.forward takes {len(arguments)} argument(s), and a "
                "distillation loss needs the student's and the teacher's record"
            )
        mappings[name] = {
            arguments[0]: {"recorder": students[0], "from_student": True},
            arguments[1]: {"recorder": teachers[0], "from_student": False},
        }
    return mappings


def check_mappings(mappings: Any, losses: Mapping[str, nn.Module], names: Names) -> dict[str, dict[str, Config]]:
    """The mappings as plain dicts, once everything they name is known to be there.

    Args:
        mappings: loss -> argument of its ``forward`` -> record.
        losses: all losses by name.
        names: the recorders and connectors that there are.

    Raises:
        FastslimTypeError: something of the wrong kind.
        FastslimValueError: a mapping to a recorder, connector, loss or argument that does not exist, or none for
            a loss or for an argument that it needs.
    """
    if not isinstance(mappings, Mapping):
        raise errors.FastslimTypeError(
            f"loss_forward_mappings should be a dict from loss to its arguments, but got {type(mappings).__name__}"
        )
    for name, mapping in mappings.items():
        if name not in losses:
            raise AssertedValueError(
                f'"{name}" is not in distill_losses, but in loss_forward_mappings; {errors.nearest(name, losses)}'
            )
        if not isinstance(mapping, Mapping):
            raise errors.FastslimTypeError(
                "Each item of loss_forward_mappings should be a dict from argument to record, but that of "
                f"{name!r} is a {type(mapping).__name__}"
            )
        _check_arguments(name, losses[name], mapping)
        for argument, record in mapping.items():
            _check_record(f"loss_forward_mappings, {name}.{argument}", record, names)
    unmapped = [name for name in losses if name not in mappings]
    if unmapped:
        raise errors.FastslimValueError(
            f"loss_forward_mappings says nothing about {', '.join(unmapped)}: add what it compares, or drop the loss"
        )
    return {name: dict(mapping) for name, mapping in mappings.items()}


def _check_arguments(name: str, loss: nn.Module, mapping: Mapping[str, Config]) -> None:
    """Every mapped argument exists, and every argument without a default is mapped."""
    parameters = inspect.signature(loss.forward).parameters.values()
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for argument in mapping:
        if argument not in known and not takes_any:
            raise AssertedValueError(
                f"loss_forward_mappings: {type(loss).__name__}.forward of {name!r} has no argument {argument!r}; "
                f"{errors.nearest(argument, known)}"
            )
    missing = [p.name for p in parameters if p.default is p.empty and p.name in known and p.name not in mapping]
    if missing:
        raise errors.FastslimValueError(
            f"loss_forward_mappings: {type(loss).__name__}.forward of {name!r} also needs {', '.join(missing)}"
        )


def _check_record(where: str, record: Config, names: Names) -> None:
    if not isinstance(record, Mapping):
        raise errors.FastslimTypeError(f"{where}: a record should be {_RECORD_FORM}, but got {record!r}")
    for key in record:
        if key not in _RECORD_KEYS:
            raise errors.FastslimValueError(f"{where} has no key {key!r}: {errors.nearest(key, _RECORD_KEYS)}")
    for key in _RECORD_KEYS[:2]:
        if key not in record:
            raise AssertedValueError(f"{where} needs {key!r}")
    if not isinstance(record["from_student"], bool):
        raise errors.FastslimTypeError(
            f"{where}: from_student should be a bool instance, but got {record['from_student']!r}"
        )
    side, known = ("student", names.students) if record["from_student"] else ("teacher", names.teachers)
    if record["recorder"] not in known:
        raise AssertedValueError(
            f"{where}: there is no {side} recorder {record['recorder']!r}; {errors.nearest(record['recorder'], known)}"
        )
    connector = record.get("connector")
    if connector is not None and connector not in names.connectors:
        raise AssertedValueError(
            f"{where}: there is no connector {connector!r}; {errors.nearest(connector, names.connectors)}"
        )
