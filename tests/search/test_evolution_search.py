"""Evolution finds the optimum, stays within its constraint, and is the same again with the same seed."""

from __future__ import annotations

import itertools
import json

import pytest
import search_cases as cases

import fastslim
from fastslim.errors import FastslimRuntimeError, FastslimTypeError, FastslimValueError
from fastslim.search import Evaluated, EvolutionSearch

SMALL = {"population_size": 12, "generations": 8, "top_k": 4}


@pytest.fixture
def algo() -> fastslim.AutoSlim:
    return cases.toy_algo(steps=0, choices=[i / 8 for i in range(1, 9)], divisor=1)


def flops(algo: fastslim.AutoSlim):
    return lambda choices: algo.subnet_cost(choices).multiply_adds


def toy_score(choices: dict[str, int]) -> float:
    """Best at 5, 9 and 4 channels, and the only optimum."""
    return -sum((choices[name] - best) ** 2 for name, best in zip(sorted(choices), (5, 9, 4), strict=True))


def all_subnets(algo: fastslim.AutoSlim) -> list[dict[str, int]]:
    units = {unit.name: unit.candidate_widths for unit in algo.mutator.mutable_units}
    return [dict(zip(units, widths, strict=True)) for widths in itertools.product(*units.values())]


@pytest.mark.parametrize("seed", range(5))
def test_the_optimum_within_each_constraint_is_found(algo, seed) -> None:
    cost = flops(algo)
    subnets = all_subnets(algo)
    full = cost(algo.mutator.max_choices)
    targets = [0.9 * full, 0.35 * full, (0.4 * full, 0.6 * full)]
    found = EvolutionSearch(
        algo.mutator, cost, toy_score, targets, population_size=20, generations=12, top_k=6, seed=seed
    ).run()
    assert len(subnets) > 300, "more than all generations of a target evaluate"
    for one, (low, high) in zip(found, [(0, 0.9), (0.4, 0.6), (0, 0.35)], strict=True):
        best = max(toy_score(choices) for choices in subnets if low * full <= cost(choices) <= high * full)
        assert one.score == toy_score(one.choices) == best
        assert low * full <= one.cost == cost(one.choices) <= one.target == high * full


def test_every_evaluated_subnet_is_new_and_within_the_constraint(algo) -> None:
    cost, records = flops(algo), []
    low, high = 20_000, 42_000
    allowed = lambda choices: choices[min(choices)] != 4  # noqa: E731
    EvolutionSearch(
        algo.mutator, cost, toy_score, [(low, high)], allowed=allowed, on_evaluated=records.append, **SMALL
    ).run()
    assert len(records) == 12 * 8
    assert len({tuple(record.choices.items()) for record in records}) == len(records)
    assert all(low <= cost(record.choices) <= high and allowed(record.choices) for record in records)
    assert {record.origin for record in records} == {"random", "mutation", "crossover"}
    assert {record.origin for record in records[:12]} == {"random"}


def test_children_take_their_widths_from_their_parents(algo) -> None:
    records: list[Evaluated] = []
    EvolutionSearch(
        algo.mutator,
        flops(algo),
        toy_score,
        [1e9],
        num_mutations=0,
        num_crossovers=12,
        top_k=2,
        population_size=12,
        generations=2,
        on_evaluated=records.append,
    ).run()
    first = sorted(records[:12], key=lambda record: -record.score)[:2]
    children = [record for record in records[12:] if record.origin == "crossover"]
    assert children
    for child in children:
        for name, width in child.choices.items():
            assert width in {parent.choices[name] for parent in first}


def test_a_generation_may_be_scored_at_once(algo) -> None:
    one_by_one: list[Evaluated] = []
    at_once: list[Evaluated] = []
    asked: list[int] = []

    def score_all(subnets: list[dict[str, int]]) -> list[float]:
        asked.append(len(subnets))
        return [toy_score(choices) for choices in subnets]

    def never(choices: dict[str, int]) -> float:
        raise AssertionError("score_all is asked instead")

    EvolutionSearch(algo.mutator, flops(algo), toy_score, [50_000], on_evaluated=one_by_one.append, **SMALL).run()
    EvolutionSearch(
        algo.mutator, flops(algo), never, [50_000], score_all=score_all, on_evaluated=at_once.append, **SMALL
    ).run()
    assert at_once == one_by_one
    assert asked == [12] * 8


def test_the_same_seed_searches_the_same_subnets_and_another_one_others(algo) -> None:
    def evaluated(seed: int) -> list[Evaluated]:
        records: list[Evaluated] = []
        algo.sample_subnet()  # what the mutator drew before does not matter
        EvolutionSearch(
            algo.mutator, flops(algo), toy_score, [3e4], seed=seed, on_evaluated=records.append, **SMALL
        ).run()
        return records

    assert evaluated(1) == evaluated(1)
    assert evaluated(1) != evaluated(2)


def test_the_mutator_draws_on_as_if_there_had_been_no_search(algo) -> None:
    before = algo.mutator.state_dict()
    EvolutionSearch(algo.mutator, flops(algo), toy_score, [3e4], **SMALL).run()
    assert algo.mutator.state_dict() == before


def test_a_constraint_that_random_subnets_never_meet_is_met_by_narrowing(algo) -> None:
    cost = flops(algo)
    smallest = cost(algo.mutator.min_choices)
    algo.mutator.sample_choices = lambda kind="random": dict(algo.mutator.max_choices)  # never fits
    (found,) = EvolutionSearch(algo.mutator, cost, toy_score, [1.5 * smallest], **SMALL).run()
    assert found.cost <= 1.5 * smallest


def test_a_small_space_is_searched_whole_and_no_further() -> None:
    algo = cases.toy_algo(steps=0, choices=[0.5, 1.0])
    records: list[Evaluated] = []
    (found,) = EvolutionSearch(
        algo.mutator, flops(algo), toy_score, [1e9], population_size=6, generations=50, on_evaluated=records.append
    ).run()
    assert len(records) == 8
    assert found.score == max(map(toy_score, all_subnets(algo)))


@pytest.mark.parametrize("stop_after", [1, 7, 12, 13, 30, 95, 96, 97, 150])
@pytest.mark.parametrize("where", ["between generations", "in the middle of one"])
def test_a_search_stopped_anywhere_ends_with_the_same_result(algo, where, stop_after) -> None:
    class StopError(Exception):
        pass

    def make(on_evaluated):
        return EvolutionSearch(algo.mutator, flops(algo), toy_score, [5e4, 2e4], on_evaluated=on_evaluated, **SMALL)

    records: list[Evaluated] = []
    expected = make(records.append).run()
    seen: list[Evaluated] = []

    def stop(record: Evaluated) -> None:
        seen.append(record)
        if len(seen) == stop_after:
            raise StopError

    state: dict = {}
    first = make(stop)
    if where == "between generations":
        first.on_step = lambda _: state.update(json.loads(json.dumps(first.state_dict())))
    with pytest.raises(StopError):
        first.run()
    if where == "in the middle of one":
        state = json.loads(json.dumps(first.state_dict()))
    rest: list[Evaluated] = []
    second = make(rest.append)
    if state:
        second.load_state_dict(state)
    assert second.run() == expected
    assert records[-len(rest) :] == rest


def test_a_range_without_a_subnet_is_named(algo) -> None:
    cost = flops(algo)
    costs = sorted({cost(choices) for choices in all_subnets(algo)})
    gap = max(range(len(costs) - 1), key=lambda i: costs[i + 1] - costs[i])
    with pytest.raises(FastslimValueError, match=f"was met in 400 tries.*cost {costs[0]} to {costs[-1]}.*widen"):
        EvolutionSearch(algo.mutator, cost, toy_score, [(costs[gap] + 1, costs[gap + 1] - 1)], **SMALL).run()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"targets": []}, FastslimValueError, "targets is empty"),
        ({"targets": [10]}, FastslimValueError, "below the smallest subnet, which costs"),
        ({"targets": [(1e8, 2e8)]}, FastslimValueError, "above the full network, which costs"),
        ({"targets": [(5e4, 2e4)]}, FastslimValueError, "50000 is above 20000"),
        ({"targets": [(1, 2, 3)]}, FastslimValueError, r"pair \(low, high\)"),
        ({"population_size": 0}, FastslimValueError, "population_size=0 should be at least 1"),
        ({"generations": 2.0}, FastslimTypeError, "generations should be a whole number, but got 2.0"),
        ({"mutation_prob": 1.5}, FastslimValueError, "mutation_prob=1.5 should lie between 0 and 1"),
        ({"num_mutations": 30, "num_crossovers": 30}, FastslimValueError, "raise population_size to 60"),
    ],
)
def test_impossible_options_are_refused(algo, options, error, message) -> None:
    options = {"targets": [3e4], **options}
    with pytest.raises(error, match=message):
        EvolutionSearch(algo.mutator, flops(algo), toy_score, **options)


def test_a_score_of_nan_names_the_subnet(algo) -> None:
    with pytest.raises(FastslimRuntimeError, match=r"the score is nan for the subnet \{'first"):
        EvolutionSearch(algo.mutator, flops(algo), lambda _: float("nan"), [3e4]).run()


def test_the_state_of_another_search_is_refused(algo) -> None:
    search = EvolutionSearch(algo.mutator, flops(algo), toy_score, [3e4], **SMALL)
    other = EvolutionSearch(algo.mutator, flops(algo), toy_score, [3e4], population_size=14, generations=8)
    with pytest.raises(FastslimValueError, match="other options"):
        search.load_state_dict(other.state_dict())
