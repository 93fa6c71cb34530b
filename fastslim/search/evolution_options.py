"""Options of the evolutionary search, checked before anything runs."""

from __future__ import annotations

from typing import Any

from fastslim.errors import FastslimTypeError, FastslimValueError
from fastslim.search.candidates import check_target

Range = tuple[float, float]


def as_range(target: Any) -> Range:
    """A target as ``(low, high)``; a single number is the high one."""
    if isinstance(target, (tuple, list)):
        if len(target) != 2:
            raise FastslimValueError(f"a range of costs is a pair (low, high), but got {target!r}")
        low, high = (check_target(value) for value in target)
        if low > high:
            raise FastslimValueError(f"a range of costs is (low, high), but {low:.12g} is above {high:.12g}")
        return low, high
    return 0.0, check_target(target)


def check_options(**options: Any) -> dict[str, Any]:
    """The options as they came.

    Raises:
        FastslimTypeError: one of the wrong kind.
        FastslimValueError: one out of range, or numbers that do not go together.
    """
    for name, value in options.items():
        if name.endswith("_prob"):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise FastslimTypeError(f"{name} should be a number, but got {value!r}")
            if not 0 <= value <= 1:
                raise FastslimValueError(f"{name}={value!r} should lie between 0 and 1")
            continue
        least = 0 if name.startswith("num_") else 1
        if isinstance(value, bool) or not isinstance(value, int):
            raise FastslimTypeError(f"{name} should be a whole number, but got {value!r}")
        if value < least:
            raise FastslimValueError(f"{name}={value} should be at least {least}")
    children = options["num_mutations"] + options["num_crossovers"]
    if children > options["population_size"]:
        raise FastslimValueError(
            f"{options['num_mutations']} mutations and {options['num_crossovers']} crossovers are more than the "
            f"population of {options['population_size']}; raise population_size to {children}"
        )
    return options
