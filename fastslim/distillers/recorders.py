"""Recorders: what passes through a module, function or method, kept by a manager while it is open."""

from __future__ import annotations

import abc
import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fastslim import errors
from fastslim.distillers.interception import locate, replaced
from fastslim.registry import MODELS


class Recorder(abc.ABC):
    """Keeps one record per call of its source, in order.

    Hooks exist only while recording, so a prepared model can be copied and pickled; records are not copied.

    Args:
        source: the name of what is watched.
    """

    def __init__(self, source: str) -> None:
        if not isinstance(source, str):
            raise errors.FastslimTypeError(
                f"{type(self).__name__}: source should be a name (str), but got {type(source).__name__}"
            )
        self.source = source
        self.data_buffer: list[Any] = []

    @abc.abstractmethod
    def prepare_from_model(self, model: nn.Module) -> None:
        """Finds the source.

        Raises:
            FastslimValueError: there is no such source; names the nearest.
        """

    @abc.abstractmethod
    def recording(self, keep: Callable[[Any], None]) -> contextlib.AbstractContextManager[Any]:
        """Inside this block every call of the source is handed to `keep`."""

    def get_record_data(self, record_idx: int = 0, data_idx: int | None = None) -> Any:
        """One record, or one element of it.

        Args:
            record_idx: which call of the source.
            data_idx: which element, where a record is a tuple or list (inputs always are).

        Raises:
            FastslimRuntimeError: nothing was recorded.
            FastslimValueError: an index out of range, or `data_idx` for a record that has no elements.
        """
        if not self.data_buffer:
            raise errors.FastslimRuntimeError(
                f"{self} has recorded nothing: it did not run inside the recorders' `with` block, the records "
                "were cleared, or the model was changed after prepare_from_student / prepare_from_teacher"
            )
        record = _element(self.data_buffer, record_idx, f"record_idx of {self}: its source ran")
        if data_idx is None:
            return record
        if not isinstance(record, (tuple, list)):
            raise errors.FastslimValueError(
                f"data_idx={data_idx} for {self}, whose record is a single {type(record).__name__}; leave data_idx out"
            )
        return _element(record, data_idx, f"data_idx of {self}: its record has")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"data_buffer": []}  # a record may hold a graph, which cannot be copied

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r})"


def _element(values: Any, index: int, what: str) -> Any:
    if not -len(values) <= index < len(values):
        raise errors.FastslimValueError(f"{what} {len(values)} time(s), index {index} is out of range")
    return values[index]


class _ModuleRecorder(Recorder):
    module: nn.Module

    def prepare_from_model(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        if self.source not in modules:
            raise errors.FastslimValueError(
                f"{self}: {type(model).__name__} has no module of this name; {errors.nearest(self.source, modules)}"
            )
        self.module = modules[self.source]

    @contextlib.contextmanager
    def recording(self, keep):
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
    """A parameter. ``source``: its name in the model, such as ``"fc.weight"``."""

    def prepare_from_model(self, model: nn.Module) -> None:
        """Finds the parameter."""
        parameters = dict(model.named_parameters())
        if self.source not in parameters:
            raise errors.FastslimValueError(
                f"{self}: {type(model).__name__} has no parameter of this name; "
                f"{errors.nearest(self.source, parameters)}"
            )
        self.parameter = parameters[self.source]

    @contextlib.contextmanager
    def recording(self, keep):
        """Records the parameter once."""
        keep(self.parameter)
        yield


class _CallRecorder(Recorder):
    is_method = False

    def prepare_from_model(self, model: nn.Module) -> None:
        locate(self.source, method=self.is_method)

    def recording(self, keep):
        return replaced(self.source, lambda original, bound: self._wrap(original, bound, keep), method=self.is_method)

    @staticmethod
    @abc.abstractmethod
    def _wrap(original: Callable[..., Any], bound: bool, keep: Callable[[Any], None]) -> Callable[..., Any]:
        """The function that stands in for the source."""


class _CallOutputsRecorder(_CallRecorder):
    @staticmethod
    def _wrap(original, bound, keep):
        def call(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            keep(output)
            return output

        return call


class _CallInputsRecorder(_CallRecorder):
    @staticmethod
    def _wrap(original, bound, keep):
        try:
            signature = inspect.signature(original)
        except ValueError:  # a builtin: its defaults are unknown
            signature = None

        def call(*args: Any, **kwargs: Any) -> Any:
            if signature is None:
                inputs = (*args, *kwargs.values())
            else:
                given = signature.bind(*args, **kwargs)
                given.apply_defaults()
                inputs = (*given.args, *given.kwargs.values())
            keep(inputs[1:] if bound else inputs)
            return original(*args, **kwargs)

        return call


@MODELS.register_module()
class FunctionOutputsRecorder(_CallOutputsRecorder):
    """What a function returns. ``source``: its import path, ``"package.module.function"``."""


@MODELS.register_module()
class FunctionInputsRecorder(_CallInputsRecorder):
    """A function's arguments in the order of its signature, defaults included, as a tuple."""


@MODELS.register_module()
class MethodOutputsRecorder(_CallOutputsRecorder):
    """What a method returns, of any instance. ``source``: ``"package.module.Class.method"``."""

    is_method = True


@MODELS.register_module()
class MethodInputsRecorder(_CallInputsRecorder):
    """A method's arguments without self, as a tuple."""

    is_method = True


def build_recorder(recorder: Recorder | Mapping[str, Any]) -> Recorder:
    """A recorder from its config, or itself.

    Raises:
        FastslimTypeError: neither a recorder nor the config of one.
    """
    if isinstance(recorder, Mapping):
        config = dict(recorder)
        kind = config.get("type")
        if isinstance(kind, str) and not kind.endswith("Recorder"):
            config["type"] = kind + "Recorder"
        recorder = MODELS.build(config)
    if not isinstance(recorder, Recorder):
        raise errors.FastslimTypeError(
            f"a recorder should be a Recorder or its config, but got {type(recorder).__name__}"
        )
    return recorder
