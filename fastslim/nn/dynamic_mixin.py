"""A layer that follows *mutables*: objects that know which of its channels are active, and may change at any time.

A mutable is any module with a `current_mask`, a boolean vector with one entry per channel of the full layer. One that
knows its active channels as ranges may say so by a method `active_segments()`, which spares the vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from fastslim import errors
from fastslim.ops.segments import Segments, merged, total


class DynamicMixin:
    """What a layer offers to mutables; without one it costs nothing, as the layer's forward is its class's.

    Attributes:
        accepted_mutable_attrs: sizes of the layer that a mutable can choose.
        attr_mappings: their names for who only knows ``in_channels`` and ``out_channels``.
    """

    _plain: ClassVar[type[nn.Module]]
    accepted_mutable_attrs: ClassVar[frozenset[str]] = frozenset()
    attr_mappings: ClassVar[Mapping[str, str]] = {}

    @property
    def static_op_factory(self) -> type[nn.Module]:
        """The torch class that :meth:`to_static_op` returns."""
        return self._plain

    @property
    def mutable_attrs(self) -> nn.ModuleDict:
        """The registered mutables by the size they choose."""
        registered = self._modules.get("mutable_attrs")  # type: ignore[attr-defined]
        return registered if isinstance(registered, nn.ModuleDict) else nn.ModuleDict()

    @classmethod
    def convert_from(cls, module: nn.Module) -> Any:
        """MMRazor's name of `from_torch`; the weights are kept."""
        return cls.from_torch(module)  # type: ignore[attr-defined]

    def register_mutable_attr(self, attr: str, mutable: Any) -> None:
        """From now on the layer is as wide as `mutable` says, also after the mutable changes.

        Input and output channels of a normalisation layer are one thing: of those the first mutable stays.

        Args:
            attr: one of `accepted_mutable_attrs`, or a name that `attr_mappings` translates.
            mutable: a module with a `current_mask` of one entry per channel.

        Raises:
            FastslimValueError: an unknown `attr`, or a mutable without a mask, or with one of another size.
            FastslimTypeError: the mutable is no module.
        """
        name = self._mutable_name(attr)
        if name in self.mutable_attrs and name != attr:
            return
        self._check_mutable(name, mutable)
        if not self.mutable_attrs:
            self._modules["mutable_attrs"] = nn.ModuleDict()  # type: ignore[attr-defined]
            self.__dict__["forward"] = self._forward_as_chosen
        self.mutable_attrs[name] = mutable

    def get_mutable_attr(self, attr: str) -> Any:
        """The mutable that chooses `attr`, or None."""
        name = self._mutable_name(attr)
        return self.mutable_attrs[name] if name in self.mutable_attrs else None

    def _mutable_name(self, attr: str) -> str:
        name = self.attr_mappings.get(attr, attr)
        if name not in self.accepted_mutable_attrs:
            raise errors.FastslimValueError(
                f"{type(self).__name__} has no {attr!r} that a mutable could choose; "
                f"{errors.nearest(attr, {*self.accepted_mutable_attrs, *self.attr_mappings})}"
            )
        return name

    def _check_mutable(self, name: str, mutable: Any) -> None:
        mask = getattr(mutable, "current_mask", None)
        full = self._full_in() if name.startswith("in_") else self._full_out()  # type: ignore[attr-defined]
        if not isinstance(mask, Tensor) or mask.dim() != 1:
            raise errors.FastslimValueError(
                f"a mutable of channels needs a current_mask, a vector with one entry per channel; "
                f"{type(mutable).__name__} has {'none' if mask is None else type(mask).__name__}"
            )
        if len(mask) != full:
            raise errors.FastslimValueError(
                f"the mask of a mutable for {name} of this {type(self).__name__} must have {full} entries, "
                f"got {len(mask)}"
            )
        if not isinstance(mutable, nn.Module):
            raise errors.FastslimTypeError(f"a mutable must be a torch.nn.Module, got {type(mutable).__name__}")

    def follow_mutables(self) -> None:
        """Takes over the present choice of the registered mutables; forward does so by itself."""
        attrs = self.mutable_attrs
        reads, makes = (self.attr_mappings.get(end, end) for end in ("in_channels", "out_channels"))
        width: dict[str, Any] = {}
        if reads in attrs:
            width["segments"] = active_segments(attrs[reads])
        if makes in attrs:
            chosen = active_segments(attrs[makes])
            width["out"] = total(chosen)
            if makes != reads:
                width["out_segments"] = merged(chosen)
        self.set_width(**width)  # type: ignore[attr-defined]

    def _forward_as_chosen(self, *args: Any, **kwargs: Any) -> Any:
        self.follow_mutables()
        return self._forward_following(*args, **kwargs)

    def _forward_following(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of a layer with mutables: the same bits as the layer that :meth:`to_static_op` makes."""
        return type(self).forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    def check_if_mutables_fixed(self) -> None:
        """Raises FastslimRuntimeError when a mutable may still change."""
        for name, mutable in self.mutable_attrs.items():
            # What consists of other mutables has nothing to fix.
            if not getattr(mutable, "is_composite", False) and not getattr(mutable, "is_fixed", True):
                raise errors.FastslimRuntimeError(
                    f"the mutable that chooses {name} of this {type(self).__name__} is not fixed; "
                    "call its fix_chosen() before to_static_op()"
                )

    def to_static_op(self) -> nn.Module:
        """A plain torch layer of the width that the mutables chose, which computes the same.

        Raises:
            FastslimRuntimeError: a mutable may still change.
        """
        self.check_if_mutables_fixed()
        if self.mutable_attrs:
            self.follow_mutables()
        return self.to_torch(self._static_inputs())  # type: ignore[attr-defined]

    def _static_inputs(self) -> int | None:
        """Input channels of the plain layer, where they do not follow from `segments`."""
        return None

    @property
    def mutable_in_channels(self) -> Any:
        """The mutable of the input channels, or None."""
        return self.get_mutable_attr("in_channels")

    @property
    def mutable_out_channels(self) -> Any:
        """The mutable of the output channels, or None."""
        return self.get_mutable_attr("out_channels")


class DynamicChannelMixin(DynamicMixin):
    """A layer with channels that mutables can choose."""


class NormalisationMutables:
    """Normalisation layers have as many output as input channels, their `num_features`."""

    accepted_mutable_attrs: ClassVar[frozenset[str]] = frozenset({"num_features"})
    attr_mappings: ClassVar[Mapping[str, str]] = {"in_channels": "num_features", "out_channels": "num_features"}

    @property
    def mutable_num_features(self) -> Any:
        """The mutable of the channels, or None."""
        return self.get_mutable_attr("num_features")  # type: ignore[attr-defined]


def active_segments(mutable: Any) -> Segments:
    """The active channels of a mutable as ``(start, count)`` ranges.

    Raises:
        FastslimValueError: no channel is active.
    """
    own = getattr(mutable, "active_segments", None)
    segments = own() if own is not None else runs(mutable.current_mask)
    if not segments:
        raise errors.FastslimValueError(f"{mutable} has no active channel; choose at least one")
    return segments


def runs(mask: Tensor) -> Segments:
    """The ranges ``(start, count)`` of a mask's true entries."""
    result: list[tuple[int, int]] = []
    for index in mask.bool().nonzero().flatten().tolist():
        if result and sum(result[-1]) == index:
            result[-1] = (result[-1][0], result[-1][1] + 1)
        else:
            result.append((index, 1))
    return tuple(result)
