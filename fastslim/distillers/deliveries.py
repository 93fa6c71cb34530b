"""Deliveries hand what a function returned in the teacher's forward to the student's, in place of its own result."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from fastslim import errors
from fastslim.contract_errors import AssertedRuntimeError
from fastslim.distillers.interception import check_path, detached, locate, replaced
from fastslim.distillers.opened import Opened, build_named
from fastslim.registry import MODELS


class DistillDelivery(Opened):
    """Keeps the results of a function and returns them again, in order, inside ``with`` blocks.

    Setting :attr:`override_data` starts a phase: False forgets what was kept and records, True replays from the
    first result on. So one teacher's results serve any number of students.

    Args:
        path: import path of the function or method.
        max_keep_data: how often it runs at most in one forward.
    """

    is_method: ClassVar[bool] = False
    _argument: ClassVar[str] = "path"

    def __init__(self, path: str, max_keep_data: int = 1) -> None:
        check_path(path, method=self.is_method, argument=self._argument)
        if max_keep_data < 1:
            raise errors.FastslimValueError(f"max_keep_data={max_keep_data} must be at least 1")
        self.path = path
        self.max_keep_data = max_keep_data
        self._override_data = False
        self._kept: list[Any] = []
        #: What is kept, or what a student has not taken yet.
        self.data_queue: deque[Any] = deque(maxlen=max_keep_data)

    @property
    def override_data(self) -> bool:
        """False while the teacher runs (record), True while a student runs (replay)."""
        return self._override_data

    @override_data.setter
    def override_data(self, override: bool) -> None:
        self._override_data = override
        if not override:
            self.clear()
        self.data_queue = deque(self._kept, maxlen=self.max_keep_data)

    def clear(self) -> None:
        """Drops what is kept."""
        self._kept = []
        self.data_queue.clear()

    def check(self) -> None:
        """Looks the function up; raises as :func:`fastslim.distillers.interception.locate`."""
        locate(self.path, method=self.is_method)

    def deliver_wrapper(self, origin: Callable[..., Any]) -> Callable[..., Any]:
        """What stands in for the function inside the ``with`` block."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.override_data:
                return self._next()
            if len(self.data_queue) == self.max_keep_data:
                raise AssertedRuntimeError(
                    f"{self.path} ran more than max_keep_data={self.max_keep_data} times in the teacher "
                    "(push into an full queue): raise max_keep_data"
                )
            output = origin(*args, **kwargs)
            self._kept.append(detached(output))
            self.data_queue.append(self._kept[-1])
            return output

        return call

    def _next(self) -> Any:
        if not self.data_queue:
            raise AssertedRuntimeError(
                f"{self.path} ran more often in the student than in the teacher, {len(self._kept)} times "
                "(pop from an empty queue): run the teacher first, with override_data=False, inside "
                "`with distiller.teacher_recorders, distiller.deliveries`"
            )
        return self.data_queue.popleft()

    def contexts(self) -> Iterable[contextlib.AbstractContextManager[Any]]:
        """Calls of the function go through :meth:`deliver_wrapper`."""
        return [replaced(self.path, lambda original, bound: self.deliver_wrapper(original), method=self.is_method)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_kept": [], "data_queue": deque(maxlen=self.max_keep_data)}


@MODELS.register_module()
class FunctionOutputsDelivery(DistillDelivery):
    """Delivers the results of ``func_path``, ``"package.module.function"``, which is looked up when used."""

    _argument = "func_path"

    def __init__(self, func_path: str, max_keep_data: int = 1) -> None:
        super().__init__(func_path, max_keep_data)
        self.func_path = func_path


@MODELS.register_module()
class MethodOutputsDelivery(DistillDelivery):
    """Delivers the results of ``method_path``, ``"package.module.Class.method"``."""

    is_method, _argument = True, "method_path"

    def __init__(self, method_path: str, max_keep_data: int = 1) -> None:
        super().__init__(method_path, max_keep_data)
        self.method_path = method_path
        self.check()


class DistillDeliveryManager(Opened):
    """All deliveries of a distiller; a ``with`` block around the teacher's forward records, around a student's replays.

    Args:
        deliveries: name -> delivery or config, whose type may be written without the ending ``Delivery``.

    Raises:
        FastslimTypeError: something of the wrong kind.
        FastslimValueError: a function or method that does not exist.
    """

    def __init__(self, deliveries: Mapping[str, DistillDelivery | Mapping[str, Any]] | None = None) -> None:
        if not isinstance(deliveries or {}, Mapping):
            raise errors.FastslimTypeError(
                f"distill_deliveries should be a dict from name to delivery, but got {type(deliveries).__name__}"
            )
        self.deliveries = {
            name: build_named(delivery, DistillDelivery, "Delivery") for name, delivery in (deliveries or {}).items()
        }
        for delivery in self.deliveries.values():
            delivery.check()
        self._override_data = False

    @property
    def override_data(self) -> bool:
        """False while the teacher runs (record), True while a student runs (replay)."""
        return self._override_data

    @override_data.setter
    def override_data(self, override: bool) -> None:
        self._override_data = override
        for delivery in self.deliveries.values():
            delivery.override_data = override

    def clear(self) -> None:
        """Drops what the teacher left."""
        for delivery in self.deliveries.values():
            delivery.clear()

    def contexts(self) -> Iterable[contextlib.AbstractContextManager[Any]]:
        """The deliveries."""
        return self.deliveries.values()

    def __repr__(self) -> str:
        return f"DistillDeliveryManager({', '.join(map(repr, self.deliveries.values()))})"
