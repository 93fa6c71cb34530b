"""Deliveries hand what a function returned in the teacher's forward to the student's, in place of its own result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from fastslim import errors
from fastslim.distillers.interception import detached, locate, replaced
from fastslim.registry import MODELS


class Delivery:
    """Keeps the results of a function and returns them again, in order.

    Args:
        path: import path of the function or method.
        max_keep_data: how often it runs at most in one forward.
    """

    is_method = False

    def __init__(self, path: str, max_keep_data: int = 1) -> None:
        if max_keep_data < 1:
            raise errors.FastslimValueError(f"max_keep_data={max_keep_data} must be at least 1")
        locate(path, method=self.is_method)
        self.path = path
        self.max_keep_data = max_keep_data
        self.data: list[Any] = []

    def delivering(self, override: bool) -> contextlib.AbstractContextManager[None]:
        """Inside this block calls are recorded, or (`override`) answered with the records from the first on."""
        if not override:
            self.data = []
        return replaced(self.path, self._replay if override else self._record, method=self.is_method)

    def _record(self, original: Callable[..., Any], bound: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(self.data) == self.max_keep_data:
                raise errors.FastslimRuntimeError(
                    f"{self.path} ran more than max_keep_data={self.max_keep_data} times in the teacher: raise it"
                )
            output = original(*args, **kwargs)
            self.data.append(detached(output))
            return output

        return call

    def _replay(self, original: Callable[..., Any], bound: bool) -> Callable[..., Any]:
        remaining = iter(self.data)

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return next(remaining)
            except StopIteration:
                raise errors.FastslimRuntimeError(
                    f"{self.path} ran more often in the student than in the teacher ({len(self.data)} times): "
                    "run the teacher first, inside `with distiller.teacher_recorders, distiller.deliveries`"
                ) from None

        return call

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"data": []}


@MODELS.register_module()
class FunctionOutputsDelivery(Delivery):
    """Delivers the results of ``func_path``, ``"package.module.function"``."""

    def __init__(self, func_path: str, max_keep_data: int = 1) -> None:
        super().__init__(func_path, max_keep_data)


@MODELS.register_module()
class MethodOutputsDelivery(Delivery):
    """Delivers the results of ``method_path``, ``"package.module.Class.method"``."""

    is_method = True

    def __init__(self, method_path: str, max_keep_data: int = 1) -> None:
        super().__init__(method_path, max_keep_data)


class DeliveryManager:
    """All deliveries of a distiller; a ``with`` block around the teacher's forward records, around a student's replays.

    Args:
        deliveries: name -> delivery or config, whose type may be written without the ending ``Delivery``.
    """

    def __init__(self, deliveries: Mapping[str, Delivery | Mapping[str, Any]] | None = None) -> None:
        if not isinstance(deliveries or {}, Mapping):
            raise errors.FastslimTypeError(
                f"distill_deliveries should be a dict from name to delivery, but got {type(deliveries).__name__}"
            )
        self.deliveries = {name: _build(delivery) for name, delivery in (deliveries or {}).items()}
        #: False while the teacher runs (record), True while a student runs (replay).
        self.override_data = False
        self._open: contextlib.ExitStack | None = None

    def clear(self) -> None:
        """Drops what the teacher left."""
        for delivery in self.deliveries.values():
            delivery.data = []

    def __enter__(self) -> DeliveryManager:
        with contextlib.ExitStack() as stack:
            for delivery in self.deliveries.values():
                stack.enter_context(delivery.delivering(self.override_data))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        stack, self._open = self._open, None
        if stack is not None:
            stack.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}


def _build(delivery: Delivery | Mapping[str, Any]) -> Delivery:
    if isinstance(delivery, Mapping):
        config = dict(delivery)
        kind = config.get("type")
        if isinstance(kind, str) and not kind.endswith("Delivery"):
            config["type"] = kind + "Delivery"
        delivery = MODELS.build(config)
    if not isinstance(delivery, Delivery):
        raise errors.FastslimTypeError(
            f"a delivery should be a Delivery or its config, but got {type(delivery).__name__}"
        )
    return delivery
