"""A Triton program as it will be launched, so that it can be compiled and looked at without a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple


class Variant(NamedTuple):
    """One program that dispatch can choose; every kernel module lists its own in ``variants()``.

    Attributes:
        name: tells it from the others of its module.
        kernel: the ``@triton.jit`` function.
        types: Triton type of every argument that is not a constant, such as ``"*bf16"`` or ``"i32"``.
        constants: value of every ``tl.constexpr`` argument; unit strides are constants, too.
        divisible: arguments that are multiples of 16, as the launcher's specialisation finds them.
        bound: what limits it: ``"memory"`` (16-byte accesses are expected), ``"matrix"`` (tensor
            cores are expected) or ``"latency"``.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...] = ()
    bound: str = "memory"
    num_warps: int = 4
    num_stages: int = 3
