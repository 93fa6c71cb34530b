"""Evolutionary search: the best subnets are crossed and mutated, generation after generation."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastslim.errors import FastslimValueError
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
    same_search,
    scores_of,
)
from fastslim.search.evolution_options import Range, as_range, check_options

#: Candidates drawn for one place in the population before another way is tried.
MAX_TRIES = 200
#: Children tried for one that is new and within the constraint; MMRazor's number.
TRIES_PER_CHILD = 10


class EvolutionSearch:
    """The best subnets within a constraint, one run for each, from the largest to the smallest.

    A generation is a population of new subnets within the constraint: children of the `top_k` best so far, filled up
    with random ones. A mutation takes every unit's width from a random subnet with `mutation_prob`, a crossover takes
    it from a second parent with `crossover_prob`. No subnet is evaluated twice; what a larger target has evaluated
    is known to the smaller ones.

    Source: Guo et al., Single Path One-Shot (ECCV 2020), section 3.4.

    Args:
        mutator: of the supernet; draws random subnets, and is put back at the end.
        cost: what a subnet costs, in the unit of `targets`; ``cost(choices)`` -> number.
        score: how good a subnet is, higher is better; ``score(choices)`` -> number.
        targets: largest costs allowed; or pairs ``(low, high)`` that the cost must lie in.
        population_size: subnets evaluated a generation.
        generations: a target.
        top_k: the best subnets, which have children.
        num_mutations: children by mutation a generation; half the population by default.
        num_crossovers: children by crossover a generation; half the population by default.
        mutation_prob: of each unit.
        crossover_prob: of each unit.
        seed: the same one, the same search.
        allowed: a further constraint, ``allowed(choices)`` -> bool.
        score_all: the scores of a generation at once, in the place of `score`: a list of choices -> a list of numbers.
        on_step: called with the best candidate so far after every generation; a good moment to save
            :meth:`state_dict`.
        on_evaluated: called with every evaluated candidate.

    Attributes:
        generation: generations done for the present target.
        top: the best subnets for the present target, best first.
        found: the targets done so far.

    Raises:
        FastslimValueError: no targets, one that no subnet can meet, or numbers that do not go together.
    """

    def __init__(
        self,
        mutator: ChannelMutator,
        cost: CostFunction,
        score: ScoreFunction,
        targets: Sequence[float | Range],
        *,
        population_size: int = 50,
        generations: int = 20,
        top_k: int = 10,
        num_mutations: int | None = None,
        num_crossovers: int | None = None,
        mutation_prob: float = 0.1,
        crossover_prob: float = 0.5,
        seed: int = 0,
        allowed: Callable[[Choices], bool] | None = None,
        score_all: ScoreAllFunction | None = None,
        on_step: Callable[[Evaluated], None] | None = None,
        on_evaluated: Callable[[Evaluated], None] | None = None,
    ) -> None:
        self.mutator, self.cost, self.allowed = mutator, cost, allowed
        self.score, self.score_all = score, score_all
        self.on_step, self.on_evaluated = on_step, on_evaluated
        self.units = candidate_widths(mutator)
        self.options: dict[str, Any] = check_options(
            population_size=population_size,
            generations=generations,
            top_k=top_k,
            num_mutations=population_size // 2 if num_mutations is None else num_mutations,
            num_crossovers=population_size // 2 if num_crossovers is None else num_crossovers,
            mutation_prob=mutation_prob,
            crossover_prob=crossover_prob,
        )
        self.targets = sorted(map(as_range, targets), key=lambda target: target[::-1], reverse=True)
        if not self.targets:
            raise FastslimValueError("targets is empty; give at least one cost to stay within")
        for low, high in self.targets:
            check_reachable(high, cost, mutator)
            if low > cost(mutator.max_choices):
                raise FastslimValueError(
                    f"the range {low:.12g} to {high:.12g} lies above the full network, which costs "
                    f"{cost(mutator.max_choices):.12g}"
                )
        self.rng = random.Random(seed)
        self.generation = 0
        self.top: list[Evaluated] = []
        self.found: list[Found] = []
        self._evaluated: dict[tuple[int, ...], Evaluated] = {}
        self._population: list[tuple[str, Choices]] | None = None  # None: between generations
        self._position = 0
        self._narrows = False  # random subnets hardly ever fit: narrow them until they do

    def run(self) -> list[Found]:
        """Searches on from where it stands.

        Returns:
            One subnet a target, from the largest target to the smallest.

        Raises:
            FastslimValueError: no subnet within a range was met.
            FastslimRuntimeError: a score that is not finite; names the subnet.
        """
        before, generator = self.mutator.current_choices, self.mutator.rng
        self.mutator.rng = self.rng  # one generator for everything drawn: one state to save
        try:
            for target in self.targets[len(self.found) :]:
                self._search(target)
        finally:
            self.mutator.rng = generator
            self.mutator.set_choices(before)
        return list(self.found)

    def _search(self, target: Range) -> None:
        if self.generation == 0 and self._population is None:
            self.top = self._best([record for record in self._evaluated.values() if self._fits(record.choices, target)])
        while self.generation < self.options["generations"]:
            if self._population is None:
                self._population, self._position = self._next_population(target), 0
            if not self._population:  # every subnet within the constraint is known
                self._population = None
                break
            left = self._population[self._position :]
            scores = scores_of([choices for _, choices in left], self.mutator, self.score, self.score_all)
            for (origin, choices), score in zip(left, scores, strict=True):
                self._record(origin, choices, score)
                self._position += 1
            members = [self._evaluated[self._key(choices)] for _, choices in self._population]
            self.top = self._best([*self.top, *members])
            self.generation += 1
            self._population = None
            if self.on_step is not None:
                self.on_step(self.top[0])
        if not self.top:
            low, high = target
            smallest, full = (self.cost(c) for c in (self.mutator.min_choices, self.mutator.max_choices))
            raise FastslimValueError(
                f"no subnet with a cost from {low:.12g} to {high:.12g} was met in {2 * MAX_TRIES} tries (subnets "
                f"cost {smallest:.12g} to {full:.12g}): widen the range"
                + (", or loosen `allowed`" if self.allowed is not None else "")
            )
        best = self.top[0]
        self.found.append(Found(target[1], dict(best.choices), best.cost, best.score))
        self.generation, self.top, self._narrows = 0, [], False

    def _record(self, origin: str, choices: Choices, score: float) -> None:
        record = Evaluated(self.generation, origin, choices, self.cost(choices), score)
        self._evaluated[self._key(choices)] = record
        if self.on_evaluated is not None:
            self.on_evaluated(record)

    def _best(self, records: list[Evaluated]) -> list[Evaluated]:
        return sorted(records, key=lambda record: -record.score)[: self.options["top_k"]]

    def _next_population(self, target: Range) -> list[tuple[str, Choices]]:
        population: dict[tuple[int, ...], tuple[str, Choices]] = {}

        def is_new(choices: Choices) -> bool:
            key = self._key(choices)
            return key not in population and key not in self._evaluated and self._fits(choices, target)

        for origin, count, child in (
            ("mutation", self.options["num_mutations"], self._mutation),
            ("crossover", self.options["num_crossovers"], self._crossover),
        ):
            wanted = len(population) + (count if self.top else 0)
            for _ in range(TRIES_PER_CHILD * count):
                if len(population) >= wanted:
                    break
                choices = child()
                if is_new(choices):
                    population[self._key(choices)] = (origin, choices)
        while len(population) < self.options["population_size"]:
            drawn = self._random(target, is_new)
            if drawn is None:
                break
            population[self._key(drawn)] = ("random", drawn)
        return list(population.values())

    def _random(self, target: Range, is_new: Callable[[Choices], bool]) -> Choices | None:
        """A new random subnet within the constraint; None when none is met."""
        if not self._narrows:
            for _ in range(MAX_TRIES):
                choices = self.mutator.sample_choices("random")
                if is_new(choices):
                    return choices
            self._narrows = True
        for _ in range(MAX_TRIES):
            choices = self._narrowed(self.mutator.sample_choices("random"), target[1])
            if is_new(choices):
                return choices
        return None

    def _narrowed(self, choices: Choices, high: float) -> Choices:
        """Takes random units down, one candidate width at a time, until the cost is low enough.

        Deep networks have a narrow distribution of costs: of 20 000 random subnets of MobileNetV2 none costs less
        than 0.15 of the full network, though the smallest one costs 0.06.
        """
        while self.cost(choices) > high:
            wide = [name for name, widths in self.units.items() if choices[name] > widths[0]]
            if not wide:
                break
            name = self.rng.choice(wide)
            choices = {**choices, name: self.units[name][self.units[name].index(choices[name]) - 1]}
        return choices

    def _mutation(self) -> Choices:
        parent, other = self.rng.choice(self.top).choices, self.mutator.sample_choices("random")
        return self._mixed(parent, other, self.options["mutation_prob"])

    def _crossover(self) -> Choices:
        parent, other = self.rng.choice(self.top).choices, self.rng.choice(self.top).choices
        return self._mixed(parent, other, self.options["crossover_prob"])

    def _mixed(self, parent: Choices, other: Choices, probability: float) -> Choices:
        return {name: (other if self.rng.random() < probability else parent)[name] for name in self.units}

    def _fits(self, choices: Choices, target: Range) -> bool:
        return target[0] <= self.cost(choices) <= target[1] and (self.allowed is None or bool(self.allowed(choices)))

    def _key(self, choices: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(choices[name] for name in self.units)

    def state_dict(self) -> dict[str, Any]:
        """Where the search stands, of plain values that JSON can hold; also in the middle of a generation."""
        version, numbers, gauss = self.rng.getstate()
        population = self._population
        return {
            "units": self.units,
            "targets": [list(target) for target in self.targets],
            "options": self.options,
            "random_state": [version, list(numbers), gauss],
            "generation": self.generation,
            "narrows": self._narrows,
            "top": [list(self._key(record.choices)) for record in self.top],
            "evaluated": [
                [record.step, record.origin, list(key), record.cost, record.score]
                for key, record in self._evaluated.items()
            ],
            "population": None if population is None else [[origin, list(self._key(c))] for origin, c in population],
            "position": self._position,
            "found": [found.as_dict() for found in self.found],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave; :meth:`run` goes on as if it had never stopped.

        Raises:
            FastslimValueError: it is of other units, targets or options.
        """
        mine = self.state_dict()
        same_search(mine, state, ("units", "targets", "options"))
        same_search(dict.fromkeys(mine), dict.fromkeys(state), list(mine))

        def choices_of(widths: Sequence[int]) -> Choices:
            return dict(zip(self.units, widths, strict=True))

        version, numbers, gauss = state["random_state"]
        self.rng.setstate((version, tuple(numbers), gauss))
        self.generation, self._position, self._narrows = state["generation"], state["position"], state["narrows"]
        self._evaluated = {
            tuple(widths): Evaluated(step, origin, choices_of(widths), cost, score)
            for step, origin, widths, cost, score in state["evaluated"]
        }
        self.top = [self._evaluated[tuple(widths)] for widths in state["top"]]
        population = state["population"]
        self._population = None if population is None else [(origin, choices_of(w)) for origin, w in population]
        self.found = [Found(**found) for found in state["found"]]
