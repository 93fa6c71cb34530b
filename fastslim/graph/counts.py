"""Sizes that remember where they came from: integers that are recorded while forward computes with them."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import fx


class CountRecorder(Protocol):
    """What a count needs of the recorder it belongs to."""

    recording: bool

    def digits_of(self, value: int) -> int:
        """What C code sees that takes the number without asking."""

    def record_count(self, function: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
        """The result of integer arithmetic, recorded."""

    def record_test(self, function: Callable[..., bool], operands: tuple[Any, ...]) -> bool:
        """The outcome of a comparison, recorded: Python code goes one way or the other."""

    def record_use(self, count: Count, *, compares: bool = True) -> None:
        """Python takes the plain number, to loop so often or to compute with it in a way that is not recorded."""


class Count(int):
    """A size of a tensor, or a number computed from sizes.

    It is an ordinary integer to everyone; arithmetic and comparisons with it are recorded, and taking it for a loop
    or a float is noted, because the recording then holds for this number only. What C code takes from an integer
    without asking (``1.0 / n``, ``math.log(n)``, ``table[n]``) cannot be noticed: `fastslim.graph.leaks` finds it by
    recording again with counts whose digits are not their values.

    Attributes:
        value: the number.
        node: what it is in the graph.
        recorder: the recording it belongs to.
    """

    value: int
    node: fx.Node
    recorder: CountRecorder

    def __new__(cls, value: int, node: fx.Node, recorder: CountRecorder) -> Count:
        """A number that stands for `node`."""
        count = super().__new__(cls, recorder.digits_of(value))
        count.value, count.node, count.recorder = value, node, recorder
        return count

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (self.value,)

    def __deepcopy__(self, memo: dict) -> int:
        return self.value

    def __hash__(self) -> int:
        return hash(self.value)

    def __repr__(self) -> str:
        return repr(self.value)

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)


def plain(value: Any) -> Any:
    """The number without its past."""
    return value.value if isinstance(value, Count) else value


def _arithmetic(name: str, function: Callable[..., Any], reflected: bool) -> Callable[..., Any]:
    def method(self: Count, other: Any) -> Any:
        if type(other) not in (int, Count, bool) or not self.recorder.recording:
            if self.recorder.recording:
                self.recorder.record_use(self, compares=False)
            value, other = self.value, plain(other)
            return function(other, value) if reflected else function(value, other)
        return self.recorder.record_count(function, (other, self) if reflected else (self, other))

    method.__name__ = name
    return method


def _comparison(function: Callable[..., bool]) -> Callable[..., bool]:
    def method(self: Count, other: Any) -> bool:
        if not isinstance(other, (int, float)):
            return NotImplemented
        if self.recorder.recording:
            return self.recorder.record_test(function, (self, other))
        return function(self.value, plain(other))

    return method


_WITH_FLOATS: dict[str, Callable[..., Any]] = {"truediv": operator.truediv, "pow": operator.pow, "divmod": divmod}


def _used(name: str) -> Callable[..., Any]:
    plain_method = getattr(int, name)

    def method(self: Count, *args: Any) -> Any:
        if self.recorder.recording:
            for count in (self, *args):
                if isinstance(count, Count):
                    self.recorder.record_use(count, compares=False)
        result = plain_method(self.value, *map(plain, args))
        function = _WITH_FLOATS.get(name.strip("_").lstrip("r"))
        if result is NotImplemented and function is not None and isinstance(args[0], (float, complex)):
            # Python would go on with the float's method, which takes the digits.
            return function(args[0], self.value) if name.startswith("__r") else function(self.value, args[0])
        return result

    method.__name__ = name
    return method


def _is_true(self: Count) -> bool:
    return self != 0


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    _function = getattr(operator, _name)
    setattr(Count, f"__{_name}__", _arithmetic(f"__{_name}__", _function, reflected=False))
    setattr(Count, f"__r{_name}__", _arithmetic(f"__r{_name}__", _function, reflected=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Count, f"__{_name}__", _comparison(getattr(operator, _name)))
for _name in (
    "int float truediv rtruediv pow rpow divmod rdivmod neg abs and rand or ror xor rxor lshift rlshift rshift "
    "rrshift round trunc ceil floor"
).split():
    setattr(Count, f"__{_name}__", _used(f"__{_name}__"))
Count.__bool__ = _is_true  # type: ignore[assignment]


@contextmanager
def noticing_ranges() -> Iterator[None]:
    """Inside, ``range`` notes the counts it is given; as a C type it would take them silently."""
    original = builtins.range

    class _Meta(type):
        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, original)

        def __call__(cls, *args: Any) -> range:
            for argument in args:
                if isinstance(argument, Count) and argument.recorder.recording:
                    argument.recorder.record_use(argument, compares=False)
            return original(*map(plain, args))

    class _Range(metaclass=_Meta):
        """Stands for `range` while forward is recorded."""

    builtins.range = _Range  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        builtins.range = original  # type: ignore[misc]
