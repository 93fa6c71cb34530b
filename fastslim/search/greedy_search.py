"""Greedy slimming: narrow one unit after the other, always the one whose loss hurts least."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastslim.errors import FastslimRuntimeError, FastslimValueError
from fastslim.mutators import ChannelMutator
from fastslim.search.candidates import (
    Choices,
    CostFunction,
    Evaluated,
    Found,
    ScoreAllFunction,
    ScoreFunction,
    candidate_widths,
    check_reachable,
    check_target,
    same_search,
    scores_of,
)


class GreedySearch:
    """From the full network down to every target, in one run.

    A decision evaluates every subnet in which one unit is narrower by one of its candidate widths, and keeps the one
    with the best score; of equal ones the first by the name of its unit. It is repeated until the cost is at most the
    target. Units that have a single width are left alone.

    Source: Yu and Huang, AutoSlim (arXiv:1903.11728), algorithm 1.

    Args:
        mutator: of the supernet; its widths are set before each call of `score`, and put back at the end.
        cost: what a subnet costs, in the unit of `targets`; ``cost(choices)`` -> number.
        score: how good a subnet is, higher is better; ``score(choices)`` -> number.
        targets: largest costs allowed, reached from the largest to the smallest.
        score_all: the scores of several subnets at once, in the place of `score` for the candidates of a decision;
            ``score_all(list of choices)`` -> list of numbers. It sets the widths itself.
        on_step: called with the kept candidate after every decision; a good moment to save :meth:`state_dict`.
        on_evaluated: called with every evaluated candidate.

    Attributes:
        choices: the subnet that the search has come to.
        cost_now: what it costs.
        step: decisions made.
        found: the targets reached so far.

    Raises:
        FastslimValueError: no targets, one below the smallest subnet, or no unit with a choice.
    """

    def __init__(
        self,
        mutator: ChannelMutator,
        cost: CostFunction,
        score: ScoreFunction,
        targets: Sequence[float],
        *,
        score_all: ScoreAllFunction | None = None,
        on_step: Callable[[Evaluated], None] | None = None,
        on_evaluated: Callable[[Evaluated], None] | None = None,
    ) -> None:
        self.mutator, self.cost, self.score, self.score_all = mutator, cost, score, score_all
        self.on_step, self.on_evaluated = on_step, on_evaluated
        self.units = candidate_widths(mutator)
        self.targets = sorted((check_target(target) for target in targets), reverse=True)
        if not self.targets:
            raise FastslimValueError("targets is empty; give at least one cost to reach")
        check_reachable(self.targets[-1], cost, mutator)
        self.step = 0
        self.choices: Choices = mutator.max_choices
        self.cost_now = cost(self.choices)
        self._score_now: float | None = None
        self._tried: dict[str, Evaluated] = {}  # candidates of the decision in progress, by the narrowed unit
        self.found: list[Found] = []

    def run(self) -> list[Found]:
        """Searches on from where it stands.

        Returns:
            One subnet a target, from the largest target to the smallest.

        Raises:
            FastslimRuntimeError: a score that is not finite (names the subnet), or a cost that does not come down to
                the target though every unit is at its smallest width.
        """
        before = self.mutator.current_choices
        try:
            for target in self.targets[len(self.found) :]:
                while self.cost_now > target:
                    self._decide(target)
                if self._score_now is None:  # the full network is cheap enough
                    (score,) = scores_of([self.choices], self.mutator, self.score, self.score_all)
                    self._score_now = self._record("full", self.choices, score).score
                self.found.append(Found(target, dict(self.choices), self.cost_now, self._score_now))
        finally:
            self.mutator.set_choices(before)
        return list(self.found)

    def _decide(self, target: float) -> None:
        candidates = self._candidates()
        if not candidates:
            raise FastslimRuntimeError(
                f"every unit is at its smallest width, but the cost is {self.cost_now:.12g}, above the target "
                f"{target:.12g}: a cost has to fall with the widths"
            )
        left = {name: choices for name, choices in candidates.items() if name not in self._tried}
        scores = scores_of(list(left.values()), self.mutator, self.score, self.score_all)
        for (name, choices), score in zip(left.items(), scores, strict=True):
            self._tried[name] = self._record(name, choices, score)
        best = max((self._tried[name] for name in candidates), key=lambda record: record.score)  # the first of equals
        self.choices, self.cost_now, self._score_now = dict(best.choices), best.cost, best.score
        self._tried = {}
        self.step += 1
        if self.on_step is not None:
            self.on_step(best)

    def _candidates(self) -> dict[str, Choices]:
        """The subnets one step narrower, by the unit that is narrowed."""
        positions = {name: widths.index(self.choices[name]) for name, widths in self.units.items()}
        return {
            name: {**self.choices, name: self.units[name][position - 1]}
            for name, position in positions.items()
            if position > 0
        }

    def _record(self, origin: str, choices: Choices, score: float) -> Evaluated:
        record = Evaluated(self.step, origin, choices, self.cost(choices), score)
        if self.on_evaluated is not None:
            self.on_evaluated(record)
        return record

    def state_dict(self) -> dict[str, Any]:
        """Where the search stands, of plain values that JSON can hold; also in the middle of a decision."""
        return {
            "units": self.units,
            "targets": list(self.targets),
            "step": self.step,
            "choices": dict(self.choices),
            "cost": self.cost_now,
            "score": self._score_now,
            "tried": [record.as_dict() for record in self._tried.values()],
            "found": [found.as_dict() for found in self.found],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave; :meth:`run` goes on as if it had never stopped.

        Raises:
            FastslimValueError: it is of other units or targets.
        """
        mine = self.state_dict()
        same_search(mine, state, ("units", "targets"))
        same_search(dict.fromkeys(mine), dict.fromkeys(state), list(mine))
        self.step, self.cost_now, self._score_now = state["step"], state["cost"], state["score"]
        self.choices = dict(state["choices"])
        self._tried = {record["origin"]: Evaluated(**record) for record in state["tried"]}
        self.found = [Found(**found) for found in state["found"]]
