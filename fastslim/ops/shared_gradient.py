"""The gradient of what a residual block begins with and adds in the end, in one pass over memory."""

from __future__ import annotations

from torch import Tensor


class SharedGradient:
    """Where the end of a block leaves the residual's gradient for the convolution at its beginning.

    The end's backward runs first. Its gradient goes here instead of to autograd, and the convolution adds its own to it
    in place, where autograd would read both and write their sum.
    """

    __slots__ = ("gradient", "taken")

    def __init__(self) -> None:
        self.gradient: Tensor | None = None
        #: Whether the beginning has promised to look here.
        self.taken = False
