"""One call of a search: scores shared by the searches for all costs, and kept in a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastslim.algorithms import SlimmableAlgorithm
from fastslim.search.budgets import Costs, Latency, costs_of
from fastslim.search.candidates import Choices, Evaluated, Key, finite_score, key_of
from fastslim.search.evolution_search import EvolutionSearch
from fastslim.search.greedy_search import GreedySearch
from fastslim.search.processes import Processes
from fastslim.search.progress import Silence
from fastslim.search.report import EvaluatedSubnet
from fastslim.search.scorer import SubnetScorer
from fastslim.search.search_folder import SearchFolder

Search = GreedySearch | EvolutionSearch


class SearchSession:
    """The scores known so far, shared by the searches for all costs, and what is written of them.

    Args:
        method: "greedy" or "evolution".
        algo: the supernet.
        latency: predicts milliseconds, if that is a cost.
        progress: what is shown.
    """

    scorer: SubnetScorer

    def __init__(self, method: str, algo: SlimmableAlgorithm, latency: Latency | None, progress: Silence) -> None:
        self.method, self.algo, self.latency = method, algo, latency
        self.processes = Processes(next(algo.architecture.parameters()).device)
        self.progress = progress if self.processes.rank == 0 else Silence()
        self.cache: dict[Key, EvaluatedSubnet] = {}
        self.searches: dict[str, Search] = {}
        self.folder: SearchFolder | None = None
        self.identity: dict[str, Any] = {}

    def prepare(self, name: str, make: Callable[..., Search], targets: Sequence[float]) -> Search:
        """Makes the search for one cost."""

        def evaluated(record: Evaluated) -> None:
            self.progress.evaluated(f"{self.method} {name}", _done(self.searches[name]), len(self.cache), record.score)

        self.searches[name] = make(
            lambda choices: self.costs(choices)[name],
            self.score,
            targets,
            # One after the other, more is kept when a generation is interrupted; there is hardly anything to share.
            score_all=self.score_all if self.method == "greedy" or self.processes.size > 1 else None,
            on_step=lambda step: self.save(),
            on_evaluated=evaluated,
        )
        return self.searches[name]

    def open(self, folder: SearchFolder, identity: dict[str, Any], resume: bool) -> None:
        """Works in a folder from now on, and takes over what it holds."""
        states, evaluated = self.processes.from_first(lambda: folder.enter(identity, resume))
        self.folder, self.identity = folder if self.processes.rank == 0 else None, identity
        for record in evaluated:
            self.cache[key_of(record["subnet"])] = EvaluatedSubnet(record["subnet"], record["costs"], record["score"])
        for name, state in states.items():
            self.searches[name].load_state_dict(state)

    def costs(self, choices: Choices) -> Costs:
        """All costs of a subnet by name."""
        costs = costs_of(self.algo.subnet_cost(choices))
        return costs if self.latency is None else {**costs, "latency": self.latency.predict(choices)}

    def score(self, choices: Choices) -> float:
        """A subnet that was evaluated before, by whichever search, is not evaluated again."""
        return self.score_all([choices])[0]

    def score_all(self, subnets: list[Choices]) -> list[float]:
        """As `score`, for several; the processes of a group share the work."""
        new = [choices for choices in subnets if key_of(choices) not in self.cache]
        for choices, value in zip(new, self.processes.share(new, self.scorer.score_all), strict=True):
            known = EvaluatedSubnet(dict(choices), self.costs(choices), finite_score(value, choices))
            if self.folder is not None:
                self.folder.append({"subnet": known.subnet, "costs": known.costs, "score": known.score})
            self.cache[key_of(choices)] = known
        return [self.cache[key_of(choices)].score for choices in subnets]

    def save(self) -> None:
        """Replaces the saved state, if there is a folder."""
        if self.folder is not None:
            self.folder.save(self.identity, {name: search.state_dict() for name, search in self.searches.items()})


def _done(search: Search) -> float:
    """Part of a search that is done."""
    if isinstance(search, EvolutionSearch):
        return (len(search.found) + search.generation / search.options["generations"]) / len(search.targets)
    start = search.cost(search.mutator.max_choices)
    way = start - search.targets[-1]
    return min((start - search.cost_now) / way, 1.0) if way > 0 else 1.0
