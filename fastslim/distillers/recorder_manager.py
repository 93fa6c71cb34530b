"""Opens and closes all recorders of one side, student or teacher, together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fastslim import errors
from fastslim.distillers.interception import detached
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
        self.detach = detach
        self.is_prepared = not self.recorders
        self._open: contextlib.ExitStack | None = None

    def prepare_from_model(self, model: nn.Module) -> None:
        """Finds the sources of all recorders in a model."""
        for recorder in self.recorders.values():
            recorder.prepare_from_model(model)
        self.is_prepared = True

    def get_recorder(self, name: str) -> Recorder:
        """A recorder by name.

        Raises:
            FastslimValueError: there is none; names the nearest.
        """
        if name not in self.recorders:
            raise errors.FastslimValueError(f"there is no recorder {name!r}; {errors.nearest(name, self.recorders)}")
        return self.recorders[name]

    def clear(self) -> None:
        """Drops all records, and with them the graphs they hold."""
        for recorder in self.recorders.values():
            recorder.data_buffer = []

    def __enter__(self) -> RecorderManager:
        if not self.is_prepared:
            raise errors.FastslimRuntimeError(
                "the recorders do not know their model yet: call distiller.prepare_from_student(model) "
                "and distiller.prepare_from_teacher(model) first"
            )
        if self._open is not None:
            raise errors.FastslimRuntimeError("these recorders are recording already: leave their `with` block first")
        self.clear()
        with contextlib.ExitStack() as stack:
            for recorder in self.recorders.values():
                stack.enter_context(recorder.recording(self._keep_in(recorder.data_buffer)))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        stack, self._open = self._open, None
        if stack is not None:
            stack.close()

    def _keep_in(self, buffer: list[Any]) -> Callable[[Any], None]:
        return (lambda value: buffer.append(detached(value))) if self.detach else buffer.append

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}
