"""Recorders of functions and methods: what goes into a call and what comes out, found by import path."""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from fastslim.distillers.interception import check_path, locate, replaced
from fastslim.distillers.recorders import Keep, Recorder
from fastslim.registry import MODELS


class _CallRecorder(Recorder):
    is_method = False

    def __init__(self, source: str) -> None:
        check_path(source, method=self.is_method, argument="source")
        super().__init__(source)
        if self.is_method:
            locate(source, method=True)

    def prepare_from_model(self, model: nn.Module | None = None) -> None:
        """Finds the function. Without a model, as of a recorder that stands alone, a function is looked up when used.

        What cannot be found is named before the first step, then, in a distiller.
        """
        if model is not None:
            locate(self.source, method=self.is_method)

    def watching(self, keep: Keep):
        """Hands every call of the function to `keep`."""
        return replaced(self.source, lambda original, bound: self._wrap(original, bound, keep), method=self.is_method)

    @staticmethod
    @abc.abstractmethod
    def _wrap(original: Callable[..., Any], bound: bool, keep: Keep) -> Callable[..., Any]:
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
