"""Opens and closes all recorders of one side, student or teacher, together."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from fastslim import errors
from fastslim.contract_errors import AssertedRuntimeError, UnknownNameError
from fastslim.distillers.recorders import Recorder, build_recorder


class RecorderManager:
    """Records with all its recorders inside a ``with`` block; entering drops the records of the last one.

    Args:
        recorders: name -> recorder or config, whose type may be written without the ending ``Recorder``.
        detach: keep records without their graph, as of a teacher.
    """

    def __init__(self, recorders: Mapping[str, Recorder | Mapping[str, Any]] | None = None, detach: bool = False):
        if not isinstance(recorders or {}, Mapping):
            raise errors.FastslimTypeError(
                f"recorders should be a dict from name to recorder, but got {type(recorders).__name__}"
            )
        self.recorders = {name: build_recorder(recorder) for name, recorder in (recorders or {}).items()}
        for recorder in self.recorders.values():
            recorder.detach = recorder.detach or detach
        self.is_prepared = not self.recorders
        self._open: contextlib.ExitStack | None = None

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

    def __enter__(self) -> RecorderManager:
        if not self.is_prepared:
            raise AssertedRuntimeError(
                "the recorders do not know their model yet: call distiller.prepare_from_student(model) "
                "and distiller.prepare_from_teacher(model) first"
            )
        if self._open is not None:
            raise errors.FastslimRuntimeError("these recorders are recording already: leave their `with` block first")
        with contextlib.ExitStack() as stack:
            for recorder in self.recorders.values():
                stack.enter_context(recorder)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        stack, self._open = self._open, None
        if stack is not None:
            stack.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}
