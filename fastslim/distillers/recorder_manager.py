"""Opens and closes all recorders of one side, student or teacher, together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fastslim import errors
from fastslim.contract_errors import AssertedRuntimeError, UnknownNameError
from fastslim.distillers.opened import Opened, build_named
from fastslim.distillers.recorders import Recorder


class RecorderManager(Opened):
    """Records with all its recorders inside a ``with`` block; entering drops the records of the last one.

    Args:
        recorders: name -> recorder or config, whose type may be written without the ending ``Recorder``.
        detach: keep records without their graph, as of a teacher.
    """

    _doing = "recording"

    def __init__(self, recorders: Mapping[str, Recorder | Mapping[str, Any]] | None = None, detach: bool = False):
        if not isinstance(recorders or {}, Mapping):
            raise errors.FastslimTypeError(
                f"recorders should be a dict from name to recorder, but got {type(recorders).__name__}"
            )
        self.recorders = {
            name: build_named(recorder, Recorder, "Recorder") for name, recorder in (recorders or {}).items()
        }
        for recorder in self.recorders.values():
            recorder.detach = recorder.detach or detach
        self.is_prepared = not self.recorders

    def initialize(self, model: nn.Module) -> None:
        """Finds the sources of all recorders in a model.

        Raises:
            FastslimValueError: a source is not there; names the nearest.
        """
        for recorder in self.recorders.values():
            recorder.initialize(model)
        self.is_prepared = True

    def get_recorder(self, recorder: str) -> Recorder:
        """A recorder by name.

        Raises:
            FastslimValueError: there is none (a `KeyError`, too); names the nearest.
        """
        if recorder not in self.recorders:
            raise UnknownNameError(f"there is no recorder {recorder!r}; {errors.nearest(recorder, self.recorders)}")
        return self.recorders[recorder]

    def clear(self) -> None:
        """Drops all records, and with them the graphs they hold."""
        for recorder in self.recorders.values():
            recorder.reset_data_buffer()

    def contexts(self) -> Iterable[contextlib.AbstractContextManager[Any]]:
        """The recorders."""
        if not self.is_prepared:
            raise AssertedRuntimeError(
                "the recorders do not know their model yet: call distiller.prepare_from_student(model) "
                "and distiller.prepare_from_teacher(model) first"
            )
        return self.recorders.values()

    def __repr__(self) -> str:
        return f"RecorderManager({', '.join(map(repr, self.recorders.values()))})"
