"""Recorders: what passes through a module or function, or a parameter, kept while they are open."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from fastslim import errors
from fastslim.contract_errors import AssertedRuntimeError, AssertedValueError
from fastslim.distillers.interception import detached
from fastslim.distillers.opened import Opened
from fastslim.registry import MODELS

Keep = Callable[[Any], None]


class Recorder(Opened, abc.ABC):
    """Keeps one record per call of its source, in order, inside a ``with`` block; entering drops those of the last.

    Use::

        recorder.initialize(model)
        with recorder:
            model(images)
        recorder.get_record_data(0)

    Hooks exist only while recording, so a prepared model can be copied and pickled; records are not copied.

    Args:
        source: the name of what is watched.

    Attributes:
        data_buffer: the records.
        detach: keep records without their graph, as of a teacher.
    """

    _doing = "recording"

    def __init__(self, source: str) -> None:
        if not isinstance(source, str):
            raise errors.FastslimTypeError(
                f"{type(self).__name__}: source should be a name (str), but got {type(source).__name__}"
            )
        self.source = source
        self.detach = False
        self.data_buffer: list[Any] = []
        self._initialized = False

    @abc.abstractmethod
    def prepare_from_model(self, model: nn.Module | None = None) -> None:
        """Finds the source.

        Raises:
            FastslimValueError: there is no such source; names the nearest. Or it needs a model, and got None.
        """

    @abc.abstractmethod
    def watching(self, keep: Keep) -> contextlib.AbstractContextManager[Any]:
        """Inside this block every call of the source is handed to `keep`."""

    @property
    def recording(self) -> bool:
        """Whether the recorder's ``with`` block is open."""
        return self._open is not None

    def initialize(self, model: nn.Module | None = None) -> None:
        """Prepares the recorder for its ``with`` block; raises as :meth:`prepare_from_model`."""
        self.prepare_from_model(model)
        self._initialized = True

    def reset_data_buffer(self) -> None:
        """Drops the records, and with them the graphs they hold."""
        self.data_buffer = []

    def get_record_data(self, record_idx: int = 0, data_idx: int | None = None) -> Any:
        """One record, or one element of it.

        Args:
            record_idx: which call of the source.
            data_idx: which element, where a record is a tuple or list (inputs always are).

        Raises:
            FastslimRuntimeError: nothing was recorded.
            FastslimValueError: an index out of range.
            FastslimTypeError: `data_idx` for a record that has no elements.
        """
        if not self.data_buffer:
            raise AssertedRuntimeError(
                f"{self} has recorded nothing: it did not run inside the recorders' `with` block, the records "
                "were cleared, or the model was changed after prepare_from_student / prepare_from_teacher "
                f"(record_idx is illegal. The length of data_buffer is 0, but record_idx is {record_idx})"
            )
        record = self._element(self.data_buffer, record_idx, "record_idx", "data_buffer")
        if data_idx is None:
            return record
        if not isinstance(record, (tuple, list)):
            raise errors.FastslimTypeError(
                "When data_idx is not None, record should be a list or tuple instance, but this record of "
                f"{self} is a single {type(record).__name__}: leave data_idx out"
            )
        return self._element(record, data_idx, "data_idx", "record")

    def _element(self, values: Any, index: int, argument: str, what: str) -> Any:
        if not -len(values) <= index < len(values):
            raise AssertedValueError(
                f"{argument} is illegal. The length of {what} is {len(values)}, but {argument} is {index} "
                f"({self}: one record per call of its source, in order)"
            )
        return values[index]

    def _keep(self, value: Any) -> None:
        self.data_buffer.append(detached(value) if self.detach else value)

    def contexts(self) -> Iterator[contextlib.AbstractContextManager[Any]]:
        """Watches the source; the records of the last block are dropped."""
        if not self._initialized:
            raise AssertedRuntimeError(
                f"{self} does not know its source yet: call recorder.initialize(model), or "
                "distiller.prepare_from_student(model) and distiller.prepare_from_teacher(model), first"
            )
        self.reset_data_buffer()
        yield self.watching(self._keep)

    def __getstate__(self) -> dict[str, Any]:
        # A record may hold a graph, which cannot be copied.
        return super().__getstate__() | {"data_buffer": []}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r})"


class _ModuleRecorder(Recorder):
    module: nn.Module

    def prepare_from_model(self, model: nn.Module | None = None) -> None:
        """Finds the module."""
        modules = dict(_needed(self, model).named_modules())
        self.module = _found(self, model, modules, "module")

    @contextlib.contextmanager
    def watching(self, keep: Keep):
        """Hands every call of the module to `keep`."""
        hook = self.module.register_forward_hook(lambda module, inputs, output: keep(self._pick(inputs, output)))
        try:
            yield
        finally:
            hook.remove()

    @staticmethod
    @abc.abstractmethod
    def _pick(inputs: tuple[Any, ...], output: Any) -> Any:
        """What of a call is kept."""


@MODELS.register_module()
class ModuleOutputsRecorder(_ModuleRecorder):
    """What a module returns. ``source``: its name in the model; ``""`` is the model itself."""

    @staticmethod
    def _pick(inputs: tuple[Any, ...], output: Any) -> Any:
        return output


@MODELS.register_module()
class ModuleInputsRecorder(_ModuleRecorder):
    """A module's positional arguments, a tuple (choose one with ``data_idx``)."""

    @staticmethod
    def _pick(inputs: tuple[Any, ...], output: Any) -> Any:
        return inputs


@MODELS.register_module()
class ParameterRecorder(Recorder):
    """A parameter, there as soon as the model is known. ``source``: its name in the model, such as ``"fc.weight"``."""

    parameter: nn.Parameter | None = None

    def prepare_from_model(self, model: nn.Module | None = None) -> None:
        """Finds the parameter."""
        self.parameter = _found(self, model, dict(_needed(self, model).named_parameters()), "parameter")
        self.reset_data_buffer()

    def reset_data_buffer(self) -> None:
        """Takes the parameter as the one record; it outlives a step anyway."""
        super().reset_data_buffer()
        if self.parameter is not None:
            self._keep(self.parameter)

    def watching(self, keep: Keep):
        """Nothing to watch."""
        return contextlib.nullcontext()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.reset_data_buffer()


def _needed(recorder: Recorder, model: nn.Module | None) -> nn.Module:
    if model is None:
        raise AssertedValueError(f"model can not be None: {recorder} looks for its source in it")
    return model


def _found(recorder: Recorder, model: Any, known: Mapping[str, Any], kind: str) -> Any:
    if recorder.source not in known:
        raise AssertedValueError(
            f'"{recorder.source}" is not in the model: {recorder}, {type(model).__name__} has no {kind} of this name; '
            f"{errors.nearest(recorder.source, filter(None, known))}"
        )
    return known[recorder.source]
