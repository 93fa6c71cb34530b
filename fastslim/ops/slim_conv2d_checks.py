"""What slim_conv2d refuses, and what it says then."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from fastslim import errors
from fastslim.ops.segments import Segments, check_devices, flatten
from fastslim.ops.step_buffers import autocast_dtype


def check_input(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuses an input that the layer cannot take.

    Raises:
        FastslimValueError: not (N, C, H, W), or on another device.
        FastslimTypeError: integers, or a dtype other than the weight's outside autocast.
    """
    if x.dim() != 4:
        raise errors.FastslimValueError(
            f"slim_conv2d: the input must be (N, C, H, W), got shape {tuple(x.shape)}; add the batch dimension?"
        )
    if not x.dtype.is_floating_point:
        raise errors.FastslimTypeError(
            f"slim_conv2d: the input is {x.dtype}; convert images first: images.float() / 255"
        )
    check_devices("slim_conv2d", x, weight, bias)
    if x.dtype != weight.dtype and autocast_dtype(x) is None:
        raise errors.FastslimTypeError(
            f"slim_conv2d: input is {x.dtype}, weight is {weight.dtype}; convert one, or run under torch.autocast"
        )


def grouped_c_out(c_in: int, weight: Tensor, groups: int, c_out: int | None, segments: Segments | None) -> int:
    """Output channels of the active groups.

    Raises:
        FastslimValueError: a group is cut, or `c_out` is another number.
    """
    size = weight.shape[1]
    if any(value % size for value in ([c_in] if segments is None else flatten(segments))):
        raise errors.FastslimValueError(
            f"slim_conv2d: a grouped convolution keeps whole groups of {size} input channels; "
            f"{c_in} active channels cut one"
        )
    expected = c_in // size * (weight.shape[0] // groups)
    if c_out not in (None, expected):
        raise errors.FastslimValueError(
            f"slim_conv2d: {c_in // size} of {groups} groups are active and give {expected} output channels, "
            f"not {c_out}; narrow or widen the layer before it"
        )
    return expected


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a setting."""
    return (value, value) if isinstance(value, int) else cast("tuple[int, int]", tuple(value))
