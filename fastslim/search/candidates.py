"""What a search handles: subnets that were evaluated, and those that were found for a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastslim.errors import FastslimRuntimeError, FastslimTypeError, FastslimValueError
from fastslim.mutators import ChannelMutator

Choices = dict[str, int]
Key = tuple[tuple[str, int], ...]
CostFunction = Callable[[Choices], float]
ScoreFunction = Callable[[Choices], float]
ScoreAllFunction = Callable[[list[Choices]], Sequence[float]]


@dataclass(frozen=True)
class Evaluated:
    """One evaluated candidate.

    Attributes:
        step: the decision (greedy) or generation (evolution) it was evaluated for, from 0.
        origin: where it came from: the unit that was narrowed, "full", "random", "mutation" or "crossover".
        choices: the width of every mutable unit.
        cost: what it costs.
        score: how good it is; higher is better.
    """

    step: int
    origin: str
    choices: Choices
    cost: float
    score: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Found:
    """The subnet that a search found for a target.

    Attributes:
        target: the largest cost that was allowed.
        choices: the width of every mutable unit.
        cost: what it costs, at most `target`.
        score: how good it is.
    """

    target: float
    choices: Choices
    cost: float
    score: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def key_of(choices: Mapping[str, int]) -> Key:
    """A subnet as a dictionary key."""
    return tuple(sorted(choices.items()))


def candidate_widths(mutator: ChannelMutator) -> dict[str, list[int]]:
    """The widths that every mutable unit may take, ascending; units in the order of their names.

    Raises:
        FastslimTypeError: not a mutator.
        FastslimValueError: no unit has more than one width.
    """
    if not isinstance(mutator, ChannelMutator):
        raise FastslimTypeError(f"mutator should be a ChannelMutator, but got {type(mutator).__name__}")
    units = {unit.name: list(unit.candidate_widths) for unit in mutator.mutable_units}
    if not units:
        raise FastslimValueError(
            f"there is nothing to search: none of the {len(mutator.units)} channel units has more than one width; "
            "list more candidate choices, take a smaller divisor, or exclude fewer modules"
        )
    return dict(sorted(units.items()))


def check_target(value: Any, what: str = "target") -> float:
    """A target as a float.

    Raises:
        FastslimTypeError: no number.
        FastslimValueError: NaN, infinite or negative.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FastslimTypeError(f"a {what} should be a number, but got {value!r}")
    if not (math.isfinite(value) and value >= 0):
        raise FastslimValueError(f"a {what} should be a finite cost of 0 or more, but got {value!r}")
    return value


def check_reachable(target: float, cost: CostFunction, mutator: ChannelMutator, what: str = "target") -> None:
    """Refuses a target below the cost of the smallest subnet.

    Raises:
        FastslimValueError: names the smallest cost.
    """
    smallest = cost(mutator.min_choices)
    if target < smallest:
        raise FastslimValueError(
            f"the {what} {target:.12g} is below the smallest subnet, which costs {smallest:.12g}; ask for at least "
            "that, or give the units smaller candidate choices"
        )


def scores_of(
    subnets: Sequence[Choices],
    mutator: ChannelMutator,
    score: ScoreFunction,
    score_all: ScoreAllFunction | None,
) -> Iterator[float]:
    """The scores of subnets: all at once, or one after the other with their widths set.

    Raises:
        FastslimRuntimeError: one that is not finite, or too few of them.
    """
    together = None if score_all is None or not subnets else list(score_all([dict(choices) for choices in subnets]))
    if together is not None and len(together) != len(subnets):
        raise FastslimRuntimeError(f"score_all gave {len(together)} scores for {len(subnets)} subnets: one each")
    for number, choices in enumerate(subnets):
        if together is None:
            mutator.set_choices(choices)
            yield finite_score(score(dict(choices)), choices)
        else:
            yield finite_score(together[number], choices)


def finite_score(value: Any, choices: Choices) -> float:
    """The score of a subnet as a finite float.

    Raises:
        FastslimRuntimeError: NaN or infinite, or no number; says which subnet.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FastslimRuntimeError(
            f"the score should be one number, but is {type(value).__name__} ({error}) for the subnet {choices}"
        ) from error
    if not math.isfinite(number):
        raise FastslimRuntimeError(
            f"the score is {number} for the subnet {choices}; no subnet can be preferred to it. Evaluate this one "
            "alone: its output or the metric is not finite"
        )
    return number


def same_search(mine: Mapping[str, Any], theirs: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuses the state of another search.

    Raises:
        FastslimValueError: names the first thing that differs.
    """
    for name in names:
        if name not in theirs:
            raise FastslimValueError(f"this is no state of such a search: it has no {name!r}")
        if theirs[name] != mine[name]:
            raise FastslimValueError(
                f"this is the state of a search with other {name}: {_short(theirs[name])} there, "
                f"{_short(mine[name])} here"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
