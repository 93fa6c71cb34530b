"""Greedy search on MobileNetV2: activations that candidates share, against every candidate computed from the input.

``python benchmarks/bench_search.py`` searches down to half of the multiply-adds twice on few images, one way and the
other, and refuses to report unless both evaluate the same subnets to the same scores. Then it scores decisions along
that way on all images, both ways in turns, and writes the times to ``benchmarks/results/search_cpu.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastslim
from conftest import machine
from fastslim.files import write_atomically
from fastslim.search import Evaluated, GreedySearch
from fastslim.search.candidates import Choices
from fastslim.search.scorer import SubnetScorer

Data = list[tuple[Tensor, Tensor]]
RESULT = Path(__file__).with_name("results") / "search_cpu.json"


def log_likelihood(output: Tensor, targets: Tensor) -> Tensor:
    """Of the right class: unlike accuracy it tells any two subnets apart."""
    return -torch.nn.functional.cross_entropy(output, targets, reduction="none")


def random_data(images: int, batch: int) -> Data:
    """Batches of noise."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(batch, 3, 32, 32, generator=generator), torch.randint(10, (batch,), generator=generator))
        for _ in range(images // batch)
    ]


def search(algo: fastslim.AutoSlim, data: Data, shared: bool) -> tuple[list[Evaluated], list[Choices], float]:
    """A whole search: what was evaluated, the subnets that decisions were made from, and seconds."""
    evaluated: list[Evaluated] = []
    path = [algo.mutator.max_choices]
    target = 0.5 * algo.subnet_cost(path[0]).multiply_adds
    with SubnetScorer(algo, data, metric=log_likelihood) as scorer:
        assert scorer.reason == "", scorer.reason
        start = time.perf_counter()
        GreedySearch(
            algo.mutator,
            lambda choices: algo.subnet_cost(choices).multiply_adds,
            scorer,
            [target],
            score_all=scorer.score_all if shared else None,
            on_step=lambda kept: path.append(kept.choices),
            on_evaluated=evaluated.append,
        ).run()
    return evaluated, path, time.perf_counter() - start


def candidates(algo: fastslim.AutoSlim, base: Choices) -> list[Choices]:
    """The subnets that a decision compares."""
    units = {unit.name: unit.candidate_widths for unit in algo.mutator.mutable_units}
    return [
        {**base, name: max(width for width in widths if width < base[name])}
        for name, widths in sorted(units.items())
        if base[name] > widths[0]
    ]


def decisions(algo: fastslim.AutoSlim, data: Data, path: Sequence[Choices]) -> list[dict[str, Any]]:
    """Scores the decisions made from these subnets batch by batch, both ways, the one first and the other in turns."""
    full = algo.subnet_cost(algo.mutator.max_choices).multiply_adds
    rows: list[dict[str, Any]] = []
    scorers = [SubnetScorer(algo, [batch], metric=log_likelihood) for batch in data]
    for base in path:
        subnets = candidates(algo, base)
        times: dict[str, list[float]] = {"shared": [], "from the input": []}
        for number, scorer in enumerate(scorers):
            with scorer:
                scores = []
                for way in list(times) if number % 2 == 0 else list(times)[::-1]:
                    start = time.perf_counter()
                    scores.append(
                        scorer.score_all(subnets) if way == "shared" else [scorer(choices) for choices in subnets]
                    )
                    times[way].append(time.perf_counter() - start)
            assert scores[0] == scores[1], "red gate: the scores differ, so no time is reported"
        ratios = [theirs / ours for ours, theirs in zip(times["shared"], times["from the input"], strict=True)]
        row = {
            "multiply-adds of full": round(algo.subnet_cost(base).multiply_adds / full, 3),
            "candidates": len(subnets),
            "seconds": {way: round(sum(own), 3) for way, own in times.items()},
            "times faster, median of the batches": round(statistics.median(ratios), 2),
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def supernet() -> fastslim.AutoSlim:
    """MobileNetV2 for small images, untrained."""
    torch.manual_seed(0)
    return fastslim.AutoSlim(
        architecture=fastslim.models.mobilenet_v2(num_classes=10, small_images=True),
        example_inputs=torch.randn(2, 3, 32, 32),
        choices=[i / 12 for i in range(2, 13)],
        seed=0,
    )


def test_decision(against: Callable[..., Any]) -> None:
    """The first decision, on one batch."""
    algo = supernet()
    subnets = candidates(algo, algo.mutator.max_choices)
    with SubnetScorer(algo, random_data(32, 32), metric=log_likelihood) as scorer:
        assert scorer.score_all(subnets) == [scorer(choices) for choices in subnets]
        against(lambda: scorer.score_all(subnets), from_the_input=lambda: [scorer(choices) for choices in subnets])


def main() -> None:
    """Compares, times and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512, help="for the decisions that are timed")
    parser.add_argument("--path-images", type=int, default=8, help="for the whole searches that have to agree")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--every", type=int, default=8, help="time every n-th decision")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    where = machine()  # now: the commit may change while it runs
    algo = supernet()
    few = random_data(options.path_images, min(options.batch, options.path_images))
    evaluated, path, ours = search(algo, few, shared=True)
    print(f"{len(path) - 1} decisions, {len(evaluated)} subnets, {ours:.0f} s", flush=True)
    expected, _, theirs = search(algo, few, shared=False)
    assert evaluated == expected, "red gate: the two searches differ, so no time is reported"
    print(f"the same from the input: {theirs:.0f} s", flush=True)
    rows = decisions(algo, random_data(options.images, options.batch), path[: -1 : options.every])
    totals = {way: round(sum(row["seconds"][way] for row in rows), 1) for way in ("shared", "from the input")}
    result = {
        "machine": where,
        "what": "bench_search.py: greedy search, MobileNetV2 at 32 x 32, 11 choices, half of the multiply-adds, scores "
        "by log-likelihood on random images; equal scores and decisions, checked before anything was timed",
        "whole search": {
            "images": options.path_images,
            "decisions": len(path) - 1,
            "subnets": len(evaluated),
            "seconds, one search after the other": {"shared": round(ours, 1), "from the input": round(theirs, 1)},
            "times faster": round(theirs / ours, 2),
        },
        "decisions": {
            "images": options.images,
            "batch": options.batch,
            "every": options.every,
            "seconds": totals,
            "times faster, median": round(
                statistics.median(row["times faster, median of the batches"] for row in rows), 2
            ),
            "rows": rows,
        },
    }
    write_atomically(options.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("machine", "whole search")}, indent=1), totals)


if __name__ == "__main__":
    main()
