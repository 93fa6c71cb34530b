"""Channel arithmetic and argument checks shared by the networks."""

from __future__ import annotations

from fastslim.errors import FastslimValueError


def scale_channels(channels: int, width_mult: float, divisor: int = 8) -> int:
    """Scales a channel count to a multiple of ``divisor``, never losing more than 10 % to the rounding.

    The rule of MobileNetV2 (Sandler et al., 2018), which also leaves the counts of width 1.0 as they are.
    """
    scaled = channels * width_mult
    rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * scaled else rounded


def check_model_options(num_classes: int, in_channels: int, width_mult: float) -> None:
    """Refuses options no network can be built with, before torch fails with a shape error."""
    if num_classes < 1:
        raise FastslimValueError(f"num_classes={num_classes}: a classifier needs at least 1 class")
    if in_channels < 1:
        raise FastslimValueError(f"in_channels={in_channels}: use 1 for grey images, 3 for colour")
    if not width_mult > 0:
        raise FastslimValueError(f"width_mult={width_mult}: must be above 0 (1.0 is the published width)")
