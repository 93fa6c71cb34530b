"""`BaseMutable`: something with a choice that layers or mutators follow, until it is fixed."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from fastslim.errors import FastslimRuntimeError, FastslimTypeError


class DumpChosen(NamedTuple):
    """What a mutable chose.

    Attributes:
        chosen: takes the mutable there again by `fix_chosen`.
        meta: what else is good to know.
    """

    chosen: Any
    meta: dict[str, Any] | None = None


class BaseMutable(nn.Module):
    """What all mutables share.

    It is a module, so that layers that follow it show it among their children and copies of a network bring their own
    mutables along; it has nothing in the state_dict.

    Args:
        alias: another name.
        init_cfg: accepted for MMRazor's sake; there is nothing to initialise.
    """

    #: Whether it consists of other mutables, so that there is nothing of its own to fix.
    is_composite = False

    def __init__(self, alias: str | None = None, init_cfg: Any = None) -> None:
        super().__init__()
        self.alias, self.init_cfg = alias, init_cfg
        self._is_fixed = False

    @property
    def current_choice(self) -> Any:
        """The present choice."""
        raise FastslimTypeError(f"{type(self).__name__} does not say its current_choice")

    @current_choice.setter
    def current_choice(self, choice: Any) -> None:
        raise FastslimTypeError(f"{type(self).__name__} takes no choice, got {choice!r}")

    @property
    def is_fixed(self) -> bool:
        """Whether the choice is final."""
        return self._is_fixed

    @is_fixed.setter
    def is_fixed(self, is_fixed: bool) -> None:
        if not isinstance(is_fixed, bool):
            raise FastslimTypeError(f"is_fixed must be True or False, got {is_fixed!r}")
        self._refuse_if_fixed()
        self._is_fixed = is_fixed

    def _refuse_if_fixed(self) -> None:
        if self._is_fixed:
            raise FastslimRuntimeError(f"{self} is fixed already; a fixed mutable keeps its choice for good")

    def fix_chosen(self, chosen: Any = None) -> None:
        """Makes `chosen`, which may be what `dump_chosen` gave, or the present choice, final.

        Raises:
            FastslimRuntimeError: it is fixed already.
        """
        self._refuse_if_fixed()
        if chosen is not None:
            self.current_choice = chosen.chosen if isinstance(chosen, DumpChosen) else chosen
        self._is_fixed = True

    def export_chosen(self) -> Any:
        """The present choice as a plain value."""
        return self.current_choice

    def dump_chosen(self) -> DumpChosen:
        """The present choice, and what else is good to know."""
        return DumpChosen(chosen=self.export_chosen())
