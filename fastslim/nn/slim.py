"""What all slim layers share: the active width, and taking the place of a torch layer."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from torch import nn

from fastslim import errors
from fastslim.ops.segments import Segments

Layer = TypeVar("Layer", bound="SlimLayer")


class SlimLayer(nn.Module):
    """Mixin before a torch layer class.

    Attributes:
        active_out: output channels in use; the first of the full layer's.
        segments: ``(start, count)`` input channels in use, or None for a plain prefix, whose length
            the input itself tells.
    """

    _plain: ClassVar[type[nn.Module]]
    active_out: int
    segments: Segments | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_full_width()

    def _full_out(self) -> int:
        raise TypeError(f"{type(self).__name__} must say how many output channels it has")

    def _check_width(self, out: int) -> None:
        """Refuses a width the layer cannot have although it is in range."""

    def _set_full_width(self) -> None:
        self.active_out, self.segments = self._full_out(), None

    @classmethod
    def from_torch(cls: type[Layer], layer: nn.Module) -> Layer:
        """A slim layer in the place of `layer`: the very same parameters, buffers, hooks and modes.

        Raises:
            FastslimTypeError: `layer` is not exactly the torch class this one replaces, so that its
                own forward, or a parametrization, would be lost.
        """
        if type(layer) is not cls._plain:
            raise errors.FastslimTypeError(
                f"{cls.__name__} replaces torch.nn.{cls._plain.__name__}, not {type(layer).__name__}: its own "
                "forward would be lost; remove parametrizations first, or exclude the layer"
            )
        slim = cls.__new__(cls)
        slim.__dict__ = {
            name: dict.copy(value) if type(value) is dict else value for name, value in layer.__dict__.items()
        }
        slim._set_full_width()
        return slim

    def set_width(self, out: int | None = None, segments: Segments | None = None) -> None:
        """Chooses the active channels.

        Args:
            out: output channels to compute, the first of the layer's; None for all.
            segments: ``(start, count)`` input channels that the input will hold; None when they are
                simply the first ones.

        Raises:
            FastslimValueError: more channels than the layer has, or none.
        """
        full = self._full_out()
        if out is None:
            out = full
        if isinstance(out, bool) or not isinstance(out, int) or not 0 < out <= full:
            raise errors.FastslimValueError(
                f"out={out!r} does not fit {type(self).__name__} with {full} channels; choose 1 to {full}"
            )
        if out != full:
            self._check_width(out)
        self.active_out = out
        self.segments = None if segments is None else tuple((int(start), int(count)) for start, count in segments)

    def extra_repr(self) -> str:
        """The torch layer's, and the width where it is not full."""
        width = "" if self.active_out == self._full_out() else f", active_out={self.active_out}"
        return super().extra_repr() + width
