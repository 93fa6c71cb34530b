"""What all slim layers share: the active width, taking the place of a torch layer, and giving it back."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from fastslim import errors
from fastslim.nn.dynamic_mixin import DynamicChannelMixin
from fastslim.ops.segments import Segments, check_segments, merged, total

Layer = TypeVar("Layer", bound="SlimLayer")
_MODULE_STATE = frozenset(nn.Module().__dict__)


class SlimLayer(DynamicChannelMixin, nn.Module):
    """Mixin before a torch layer class.

    Attributes:
        active_out: number of output channels in use; the first of the full layer's, or `out_segments`.
        segments: ``(start, count)`` input channels in use, or None for a plain prefix, whose length
            the input itself tells.
        out_segments: ``(start, count)`` output channels in use when they are not simply the first
            ones: a fused query-key-value layer keeps the first heads of three blocks.
    """

    _plain: ClassVar[type[nn.Module]]
    #: What a layer knows of its width; a plain layer has none of it (a `forward` of its own follows mutables).
    _width_state: ClassVar[tuple[str, ...]] = ("active_out", "segments", "out_segments", "forward")
    active_out: int
    segments: Segments | None
    out_segments: Segments | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refuse(self)
        self._set_full_width()

    def _full_out(self) -> int:
        raise TypeError(f"{type(self).__name__} must say how many output channels it has")

    def _check_width(self, out: int) -> None:
        """Refuses a width the layer cannot have although it is in range."""

    @classmethod
    def _refuse(cls, layer: nn.Module) -> None:
        """Refuses settings of the torch layer that have no meaning at a narrow width."""

    def _set_full_width(self) -> None:
        self.active_out, self.segments, self.out_segments = self._full_out(), None, None

    @classmethod
    def from_torch(cls: type[Layer], layer: nn.Module) -> Layer:
        """A slim layer in the place of `layer`: the very same parameters, buffers, hooks and modes.

        Raises:
            FastslimTypeError: `layer` is not exactly the torch class this one replaces, so that its
                own forward, or a parametrization, would be lost; or its weight is made by a hook.
            FastslimValueError: a setting that has no meaning at a narrow width.
        """
        if type(layer) is not cls._plain or "forward" in layer.__dict__:
            raise errors.FastslimTypeError(
                f"{cls.__name__} replaces torch.nn.{cls._plain.__name__}, not {type(layer).__name__}: its own "
                "forward would be lost; remove parametrizations first, or exclude the layer"
            )
        made = [name for name, value in layer.__dict__.items() if isinstance(value, Tensor)]
        if made:
            raise errors.FastslimTypeError(
                f"the {made[0]} of this {cls._plain.__name__} is made by a hook (weight_norm, spectral_norm, pruning) "
                "and is no parameter; make it one first (remove_weight_norm, prune.remove), or exclude the layer"
            )
        cls._refuse(layer)
        slim = cls.__new__(cls)
        slim.__dict__ = {
            name: dict.copy(value) if type(value) is dict else value for name, value in layer.__dict__.items()
        }
        slim._set_full_width()
        return slim

    def set_width(
        self, out: int | None = None, segments: Segments | None = None, out_segments: Segments | None = None
    ) -> None:
        """Chooses the active channels.

        Args:
            out: output channels to compute; None for all, or for as many as `out_segments` hold.
            segments: ``(start, count)`` input channels that the input will hold; None when they are
                simply the first ones.
            out_segments: ``(start, count)`` output channels to compute; None for the first `out`.

        Raises:
            FastslimValueError: more channels than the layer has, or none; segments that do not fit.
        """
        full = self._full_out()
        out_segments = as_segments(out_segments)
        if out is None:
            out = full if out_segments is None else total(out_segments)
        if isinstance(out, bool) or not isinstance(out, int) or not 0 < out <= full:
            raise errors.FastslimValueError(
                f"out={out!r} does not fit {type(self).__name__} with {full} channels; choose 1 to {full}"
            )
        if out_segments is not None:
            _check_out_segments(type(self).__name__, out_segments, out, full)
        if out != full:
            self._check_width(out)
        self.active_out = out
        self.segments = as_segments(segments)
        self.out_segments = merged(out_segments)

    def _full_in(self) -> int:
        """Input channels of the full layer."""
        return self._full_out()

    def _usual_in(self) -> int:
        """Input channels when neither the segments nor the caller say it."""
        return self._full_in()

    def _at_width(self, channels: int) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
        """Attributes and tensors of the plain layer for an input of so many channels."""
        raise TypeError(f"{type(self).__name__} has no plain form")

    def to_torch(self, in_channels: int | None = None) -> nn.Module:
        """A new plain torch layer of exactly the current width, without anything of fastslim in it.

        Weights and buffers are copies with the same `requires_grad`, dtype, device and training mode.
        Hooks stay behind.

        Args:
            in_channels: channels of its input, where `segments` does not say them; all by default.

        Raises:
            FastslimValueError: an input that does not fit the layer or its segments.
        """
        sizes, tensors = self._at_width(self._input_channels(self.segments, in_channels))
        plain = bare_copy(self, self._plain, without=self._width_state)
        plain.__dict__.update(sizes)
        put_copies(plain, self, tensors)
        return plain

    def _input_channels(self, segments: Segments | None, asked: int | None) -> int:
        usual = self._usual_in() if segments is None else total(segments)
        channels = usual if asked is None else asked
        check_segments(f"{type(self).__name__}.to_torch", segments, channels, self._full_in())
        return channels

    def extra_repr(self) -> str:
        """The torch layer's, and the width where it is not full."""
        width = "" if self.active_out == self._full_out() else f", active_out={self.active_out}"
        return super().extra_repr() + width


def as_segments(segments: Segments | None) -> Segments | None:
    """Segments as tuples of plain numbers, whatever kind of sequences they came in."""
    return None if segments is None else tuple((int(start), int(count)) for start, count in segments)


def bare_copy(layer: nn.Module, kind: type[nn.Module], without: tuple[str, ...] = ()) -> nn.Module:
    """A `kind` with the settings of `layer`, but no parameters, buffers, children or hooks.

    The constructor is left out: it would draw random weights and so change the random state.
    """
    copy = kind.__new__(kind)
    nn.Module.__init__(copy)
    left_out = _MODULE_STATE.union(without)
    copy.__dict__.update({name: value for name, value in layer.__dict__.items() if name not in left_out})
    copy.training = layer.training
    return copy


def put_copies(plain: nn.Module, layer: nn.Module, tensors: dict[str, Tensor | None]) -> None:
    """Registers copies of `tensors` in `plain` as what they are in `layer`: parameters or buffers."""
    for name, value in tensors.items():
        copy = None if value is None else value.detach().clone()
        if name in layer._parameters:
            old = layer._parameters[name]
            plain.register_parameter(name, None if copy is None else nn.Parameter(copy, old.requires_grad))
        else:
            plain.register_buffer(name, copy, persistent=name not in layer._non_persistent_buffers_set)


def _check_out_segments(name: str, segments: Segments, out: int, full: int) -> None:
    end = 0
    for start, count in segments:
        if count < 0 or start < end or start + count > full:
            raise errors.FastslimValueError(
                f"{name}: out_segments {segments} must be in order, apart, and inside the layer's {full} output "
                "channels"
            )
        end = start + count
    if total(segments) != out:
        raise errors.FastslimValueError(
            f"{name}: out_segments {segments} hold {total(segments)} channels, but out={out}; leave `out` away or "
            "make them agree"
        )
