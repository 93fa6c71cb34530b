"""Choosing the widths of units: what can be chosen, at random or not, and what is."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from fastslim.errors import FastslimRuntimeError, FastslimTypeError, FastslimValueError, nearest
from fastslim.mutators.units import SequentialMutableChannelUnit

Unit = SequentialMutableChannelUnit
Choices = dict[str, int]


class UnitChoices:
    """The units of a supernet and their widths.

    Args:
        random_widths: "per_unit" draws one width for each unit, "uniform" one ratio for all of a subnet.
        seed: of the random widths; None takes one from the operating system.

    Attributes:
        rng: what random widths are drawn with.
    """

    def __init__(self, random_widths: str = "per_unit", seed: int | None = None) -> None:
        if random_widths not in ("per_unit", "uniform"):
            raise FastslimValueError(f"random_widths must be 'per_unit' or 'uniform', got {random_widths!r}")
        self.random_widths = random_widths
        self.rng = random.Random(seed)
        self._units: dict[str, Unit] | None = None

    @property
    def name2unit(self) -> dict[str, Unit]:
        """All units by name, also those that stay at full width.

        Raises:
            FastslimRuntimeError: before `prepare_from_supernet`.
        """
        if self._units is None:
            raise FastslimRuntimeError(f"{type(self).__name__} has no supernet yet; call prepare_from_supernet(model)")
        return self._units

    @property
    def is_prepared(self) -> bool:
        """Whether there is a supernet."""
        return self._units is not None

    @property
    def units(self) -> list[Unit]:
        """All units, also those that stay at full width."""
        return list(self.name2unit.values())

    @property
    def mutable_units(self) -> list[Unit]:
        """The units with more than one width."""
        return [unit for unit in self.units if unit.is_mutable]

    @property
    def search_groups(self) -> dict[int, list[Unit]]:
        """The mutable units, each in a group of its own."""
        return {i: [unit] for i, unit in enumerate(self.mutable_units)}

    @property
    def current_choices(self) -> Choices:
        """The present width of every mutable unit."""
        return {unit.name: unit.width for unit in self.mutable_units}

    @property
    def choice_template(self) -> Choices:
        """A dict as `set_choices` takes it."""
        return self.current_choices

    @property
    def max_choices(self) -> Choices:
        """The widest subnet."""
        return {unit.name: unit.candidate_widths[-1] for unit in self.mutable_units}

    @property
    def min_choices(self) -> Choices:
        """The narrowest subnet."""
        return {unit.name: unit.candidate_widths[0] for unit in self.mutable_units}

    def sample_choices(self, kind: str = "random") -> Choices:
        """A subnet: the width of every mutable unit.

        Args:
            kind: "random", "max" or "min".

        Raises:
            FastslimValueError: for another kind.
        """
        if kind == "max":
            return self.max_choices
        if kind == "min":
            return self.min_choices
        if kind != "random":
            raise FastslimValueError(f"kind must be 'random', 'max' or 'min', got {kind!r}")
        units = self.mutable_units
        if self.random_widths == "uniform" and units:
            widest = max(units, key=lambda unit: len(unit.candidate_widths))
            return self.uniform_choices(self.rng.choice(widest.candidate_widths) / widest.num_channels)
        return {unit.name: self.rng.choice(unit.candidate_widths) for unit in units}

    def uniform_choices(self, ratio: float) -> Choices:
        """The subnet in which every unit is as near to `ratio` of its full width as its candidates allow.

        Raises:
            FastslimValueError: unless 0 < ratio <= 1.
        """
        if not 0 < ratio <= 1:
            raise FastslimValueError(f"ratio must lie above 0 and up to 1, got {ratio!r}")
        return {unit.name: unit.nearest_width(ratio) for unit in self.mutable_units}

    def set_choices(self, choices: Mapping[str, Any]) -> None:
        """Sets the width of units, and of all layers that follow.

        Args:
            choices: by unit name; a whole number is a width, a float a ratio of the full one. Units that are left out
                keep their width.

        Raises:
            FastslimValueError: for an unknown unit, or a width that is no candidate. Nothing is changed then.
        """
        units = self.name2unit
        if not isinstance(choices, Mapping):
            raise FastslimTypeError(f"choices must be a dict from unit name to width, got {type(choices).__name__}")
        for name in choices:
            if name not in units:
                raise FastslimValueError(f"no unit is called {name!r}; {nearest(str(name), units)}")
        widths = {name: units[name].as_width(choice) for name, choice in choices.items()}
        for name, width in widths.items():
            units[name].width = width
        self._apply()

    def _apply(self) -> None:
        """Tells the layers the units' widths."""

    def set_max_choices(self) -> None:
        """Makes the supernet its widest subnet."""
        self.set_choices(self.max_choices)

    def set_min_choices(self) -> None:
        """Makes the supernet its narrowest subnet."""
        self.set_choices(self.min_choices)

    def fix_channel_mutables(self) -> None:
        """Leaves the present subnet as the only choice."""
        for unit in self.units:
            unit.fix_chosen()

    def state_dict(self) -> dict[str, Any]:
        """The random state and the present choices, of plain numbers, for a resumed run to go on with."""
        version, numbers, gauss = self.rng.getstate()
        return {"random_state": [version, list(numbers), gauss], "choices": self.current_choices}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            FastslimValueError: when it is of another supernet.
        """
        if set(state) != {"random_state", "choices"}:
            raise FastslimValueError(f"a mutator's state holds 'random_state' and 'choices', got {sorted(state)}")
        lacking = [name for name in self.current_choices if name not in state["choices"]]
        if lacking:
            raise FastslimValueError(f"this mutator's state is of another supernet: it lacks unit {lacking[0]!r}")
        self.set_choices(state["choices"])
        version, numbers, gauss = state["random_state"]
        self.rng.setstate((version, tuple(numbers), gauss))
