"""Greedy slimming makes the decisions of the plain algorithm, stops where it should, and goes on where it stopped."""

from __future__ import annotations

import json
import math
import random

import pytest
import search_cases as cases
import torch
from torch.nn import functional as F

import fastslim
from fastslim.errors import FastslimRuntimeError, FastslimTypeError, FastslimValueError
from fastslim.search import Evaluated, GreedySearch, greedy


@pytest.fixture
def algo() -> fastslim.AutoSlim:
    return cases.toy_algo(steps=0)


def random_score(seed: int, levels: int = 1_000_000):
    """Arbitrary but fixed scores; few levels give many ties."""

    def score(choices: dict[str, int]) -> float:
        return random.Random(f"{seed}{sorted(choices.items())}").randrange(levels)

    return score


def flops(algo: fastslim.AutoSlim):
    return lambda choices: algo.subnet_cost(choices).multiply_adds


def bins_loop(mutator, cost, score, targets):
    """Channel bins as in MMRazor: each unit starts in its last bin, one bin less per step, first best by name."""
    choices_of = {unit.name: unit.candidate_choices for unit in mutator.mutable_units}
    bins = {name: len(choices) for name, choices in choices_of.items()}

    def widths(bins):
        ratios = {name: choices_of[name][count - 1] for name, count in bins.items()}
        return {unit.name: unit.as_width(ratios[unit.name]) for unit in mutator.mutable_units}

    results = []
    for target in sorted(targets, reverse=True):
        while cost(widths(bins)) > target:
            best_score, best = None, None
            for name in sorted(bins):
                if bins[name] == 1:
                    continue
                pruned = {**bins, name: bins[name] - 1}
                value = score(widths(pruned))
                if best_score is None or value > best_score:
                    best_score, best = value, pruned
            bins = best
        results.append(widths(bins))
    return results


@pytest.mark.parametrize("levels", [2, 1_000_000], ids=["many ties", "no ties"])
@pytest.mark.parametrize("seed", range(8))
def test_decisions_are_those_of_the_loop_over_bins(algo, seed, levels) -> None:
    score, cost = random_score(seed, levels), flops(algo)
    full = cost(algo.mutator.max_choices)
    targets = [0.3 * full, full, 0.7 * full, 0.12 * full]
    found = GreedySearch(algo.mutator, cost, score, targets).run()
    assert [one.target for one in found] == sorted(targets, reverse=True)
    assert [one.choices for one in found] == bins_loop(algo.mutator, cost, score, targets)
    for one in found:
        assert one.cost == cost(one.choices) <= one.target
        assert one.score == score(one.choices)


@pytest.mark.parametrize("metric", ["accuracy", "likelihood"])
def test_decisions_are_those_of_evaluating_every_candidate_from_the_input(metric) -> None:
    algo = cases.toy_algo().double()
    data = [(images.double(), labels) for images, labels in cases.toy_data()]
    # Units by what they are in the plain network: around the addition, inside it, at the end.
    names = [next(u.name for u in algo.mutator.units if key in u.name) for key in ("first", "inner", "last")]
    candidates = {unit.name: unit.candidate_widths for unit in algo.mutator.mutable_units}
    assert sorted(names) == sorted(candidates)

    def score(choices: dict[str, int]) -> float:
        total = 0.0
        for images, labels in data:
            logits = cases.plain_logits(algo.architecture, images, *(choices[name] for name in names))
            right = (logits.argmax(1) == labels).double() if metric == "accuracy" else log_likelihood(logits, labels)
            total += right.sum().item()
        return total / (cases.BATCHES * cases.BATCH)

    full = algo.mutator.max_choices
    current, path = dict(full), []
    target = 0.1 * cases.plain_multiply_adds(8, 12, 6)
    while cases.plain_multiply_adds(*(current[name] for name in names)) > target:
        tried = []
        for name in sorted(names):
            narrower = [width for width in candidates[name] if width < current[name]]
            if narrower:
                tried.append({**current, name: max(narrower)})
        scores = [score(choices) for choices in tried]
        current = tried[scores.index(max(scores))]
        path.append((current, max(scores)))

    report = greedy(
        algo,
        data,
        {"flops": [0.1]},
        metric=None if metric == "accuracy" else log_likelihood,
        progress=False,
    )
    evaluated = {tuple(sorted(one.subnet.items())): one.score for one in report.evaluated}
    for choices, expected in path:
        assert evaluated[tuple(sorted(choices.items()))] == pytest.approx(expected, abs=1e-9)
    assert report.best("flops", 0.1) == current
    assert len(path) > 4


def log_likelihood(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(output, targets, reduction="none")


def test_smaller_targets_continue_where_larger_ones_were_reached(algo) -> None:
    score, cost = random_score(3), flops(algo)
    full = cost(algo.mutator.max_choices)
    counted: list[Evaluated] = []
    both = GreedySearch(algo.mutator, cost, score, [0.6 * full, 0.2 * full], on_evaluated=counted.append).run()
    alone: list[Evaluated] = []
    low = GreedySearch(algo.mutator, cost, score, [0.2 * full], on_evaluated=alone.append).run()
    assert both[1] == low[0]
    assert counted == alone


def test_the_choices_are_set_when_a_score_is_asked_for(algo) -> None:
    def score(choices: dict[str, int]) -> float:
        assert algo.mutator.current_choices == choices
        return 0.0

    algo.mutator.set_min_choices()
    GreedySearch(algo.mutator, flops(algo), score, [8000]).run()
    assert algo.mutator.current_choices == algo.mutator.min_choices, "put back as it was"


def test_the_candidates_of_a_decision_may_be_scored_at_once(algo) -> None:
    score, cost = random_score(4), flops(algo)
    one_by_one: list[Evaluated] = []
    GreedySearch(algo.mutator, cost, score, [8000], on_evaluated=one_by_one.append).run()
    asked: list[list[dict[str, int]]] = []

    def score_all(subnets: list[dict[str, int]]) -> list[float]:
        asked.append(subnets)
        return [score(choices) for choices in subnets]

    def never(choices: dict[str, int]) -> float:
        raise AssertionError("score_all is asked instead")

    at_once: list[Evaluated] = []
    GreedySearch(algo.mutator, cost, never, [8000], score_all=score_all, on_evaluated=at_once.append).run()
    assert at_once == one_by_one
    assert len(asked) == at_once[-1].step + 1, "one call a decision"
    with pytest.raises(FastslimRuntimeError, match="score_all gave 1 scores for 3 subnets"):
        GreedySearch(algo.mutator, cost, never, [8000], score_all=lambda _: [0.0]).run()


def test_equal_scores_go_to_the_first_unit_by_name(algo) -> None:
    kept: list[Evaluated] = []
    GreedySearch(algo.mutator, flops(algo), lambda _: 1.0, [8000], on_step=kept.append).run()
    first = min(unit.name for unit in algo.mutator.mutable_units)
    assert [step.origin for step in kept][:3] == [first] * 3


def test_units_of_one_width_are_left_alone() -> None:
    algo = cases.toy_algo(steps=0, exclude=["inner"])
    evaluated: list[Evaluated] = []
    smallest = flops(algo)(algo.mutator.min_choices)
    (found,) = GreedySearch(algo.mutator, flops(algo), random_score(0), [smallest], on_evaluated=evaluated.append).run()
    assert found.choices == algo.mutator.min_choices
    assert not any("inner" in record.origin for record in evaluated)


@pytest.mark.parametrize("where", ["between decisions", "in the middle of one"])
def test_a_search_stopped_anywhere_ends_with_the_same_result(algo, where) -> None:
    score, cost = random_score(5), flops(algo)
    targets = [f * cost(algo.mutator.max_choices) for f in (0.6, 0.35, 0.1)]
    records: list[Evaluated] = []
    expected = GreedySearch(algo.mutator, cost, score, targets, on_evaluated=records.append).run()

    class StopError(Exception):
        pass

    for stop_after in range(1, len(records)):
        seen: list[Evaluated] = []

        def stop(record: Evaluated, seen=seen, stop_after=stop_after) -> None:
            seen.append(record)
            if len(seen) == stop_after:
                raise StopError

        state: dict = {}
        if where == "between decisions":
            first = GreedySearch(algo.mutator, cost, score, targets, on_evaluated=stop)
            first.on_step = lambda _, first=first, state=state: state.update(json.loads(json.dumps(first.state_dict())))
        else:
            first = GreedySearch(algo.mutator, cost, score, targets, on_evaluated=stop)
        with pytest.raises(StopError):
            first.run()
        if where == "in the middle of one":
            state = json.loads(json.dumps(first.state_dict()))
        rest: list[Evaluated] = []
        second = GreedySearch(algo.mutator, cost, score, targets, on_evaluated=rest.append)
        if state:
            second.load_state_dict(state)
        assert second.run() == expected
        assert rest[-1] == records[-1]
        assert records[-len(rest) :] == rest, "what comes after the stop is what would have come"


def test_a_target_below_the_smallest_subnet_is_refused_before_anything_runs(algo) -> None:
    smallest = flops(algo)(algo.mutator.min_choices)

    def never(choices: dict[str, int]) -> float:
        raise AssertionError("nothing may run")

    with pytest.raises(FastslimValueError, match=f"below the smallest subnet, which costs {smallest};"):
        GreedySearch(algo.mutator, flops(algo), never, [1e6, smallest - 1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_names_the_subnet(algo, bad) -> None:
    with pytest.raises(FastslimRuntimeError, match=r"the score is -?(nan|inf) for the subnet \{'first_\(0, 8\)_8': 6"):
        GreedySearch(algo.mutator, flops(algo), lambda _: bad, [8000]).run()


def test_a_score_that_is_no_number_is_named(algo) -> None:
    with pytest.raises(FastslimRuntimeError, match="one number, but is Tensor"):
        GreedySearch(algo.mutator, flops(algo), lambda _: torch.zeros(3), [8000]).run()


def test_a_cost_that_does_not_fall_with_the_widths_is_named(algo) -> None:
    costs = iter([5, 10])  # of the smallest subnet, when the target is checked; of the full one
    with pytest.raises(FastslimRuntimeError, match="smallest width, but the cost is 10"):
        GreedySearch(algo.mutator, lambda _: next(costs, 10), lambda _: 0.0, [6]).run()


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([], FastslimValueError, "targets is empty"),
        (["0.5"], FastslimTypeError, "a target should be a number, but got '0.5'"),
        ([math.nan], FastslimValueError, "finite cost"),
        ([-1], FastslimValueError, "finite cost"),
    ],
)
def test_targets_that_are_none_are_refused(algo, targets, error, message) -> None:
    with pytest.raises(error, match=message):
        GreedySearch(algo.mutator, flops(algo), lambda _: 0.0, targets)


def test_a_network_without_a_choice_is_refused(algo) -> None:
    algo.mutator.fix_channel_mutables()
    with pytest.raises(FastslimValueError, match="nothing to search: none of the 4 channel units"):
        GreedySearch(algo.mutator, flops(algo), lambda _: 0.0, [8000])
    with pytest.raises(FastslimTypeError, match="should be a ChannelMutator, but got AutoSlim"):
        GreedySearch(algo, flops(algo), lambda _: 0.0, [8000])


def test_the_state_of_another_search_is_refused(algo) -> None:
    search = GreedySearch(algo.mutator, flops(algo), lambda _: 0.0, [8000])
    other = GreedySearch(algo.mutator, flops(algo), lambda _: 0.0, [9000])
    with pytest.raises(FastslimValueError, match=r"other targets: \[9000\] there, \[8000\] here"):
        search.load_state_dict(other.state_dict())
    wider = cases.toy_algo(steps=0, choices=[0.5, 1.0])
    foreign = GreedySearch(wider.mutator, flops(wider), lambda _: 0.0, [30000])
    with pytest.raises(FastslimValueError, match="other units"):
        search.load_state_dict(foreign.state_dict())
    with pytest.raises(FastslimValueError, match="has no 'tried'"):
        search.load_state_dict({k: v for k, v in search.state_dict().items() if k != "tried"})
