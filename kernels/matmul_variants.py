"""How the matrix kernels' programs are written down, so that they can be compiled without a GPU."""

from __future__ import annotations

from typing import Any

from fastslim.kernels import matmul_tiles as tiles
from fastslim.kernels.matmul_tiles import Tile
from fastslim.kernels.variant import Variant

_MAY_BE_NONE = ("bias", "prologue", "addend", "saved", "stats", "widths")
_OPTIONAL = {"b": "bias", "p": "prologue", "m": "saved", "s": "stats", "a": "addend", "w": "widths"}
_TYPES = {"prologue": "*fp32", "stats": "*fp32", "addend": "*fp32", "widths": "*i32"}


def forward_variant(
    kernel: Any, name: str, tile: Tile, dtype: str = "bf16", *, unit: int = 1, fused: str = "", **constants: Any
) -> Variant:
    """A program of a forward kernel.

    Args:
        kernel: `slim_linear_fwd_kernel` or `slim_conv2d_fwd_kernel`.
        name: what it computes.
        tile: its block sizes.
        dtype: of the operands.
        unit: 1 forward, 2 backward-data: which stride of the weight is 1.
        fused: letters of b(ias), p(rologue), m(ask of the preceding activation), s(tatistics),
            a(ddend), w(idths in device memory).
        constants: what differs from the usual program.
    """
    given = {"x": f"*{dtype}", "w": f"*{dtype}", "y": f"*{dtype}"}
    for letter, argument in _OPTIONAL.items():
        if letter in fused:
            given[argument] = _TYPES.get(argument, f"*{dtype}")
    fixed = {"UNIT": unit, "TRANSPOSED": unit == 2, "ACTIVATION": 1, "SAVED_ACTIVATION": 2}
    fixed |= {"GROUP_M": tile.group} | constants
    return _variant(kernel, f"{name}-{dtype}-{tile.name}", tile, dtype, given, fixed)


def weight_variant(
    kernel: Any, tile: Tile, dtype: str = "bf16", *, prologue: bool = False, **constants: Any
) -> Variant:
    """A program of a weight gradient's kernel, as :func:`forward_variant`."""
    given = {"dy": f"*{dtype}", "x": f"*{dtype}", "out": "*fp32"} | ({"prologue": "*fp32"} if prologue else {})
    fixed = {"stride_i": 1, "ACTIVATION": 1, "ADD": False} | constants
    return _variant(kernel, f"{'prologue-' if prologue else ''}{dtype}-{tile.name}", tile, dtype, given, fixed)


def _variant(kernel: Any, name: str, tile: Tile, dtype: str, given: dict[str, str], fixed: dict[str, Any]) -> Variant:
    exact = dtype == "fp32" and tile != tiles.TF32
    constants = {"MULTIPLE": 16 // (4 if dtype == "fp32" else 2), "PRECISION": "ieee" if exact else "tf32"}
    constants |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k} | fixed
    left = [argument for argument in kernel.arg_names if argument not in given and argument not in constants]
    absent = [argument for argument in left if argument in _MAY_BE_NONE]
    return Variant(
        name=name,
        kernel=kernel,
        types=given | {argument: "i32" for argument in left if argument not in absent},
        constants=constants | dict.fromkeys(absent),
        divisible=tuple(given),
        bound="latency" if exact else "matrix",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
