"""Costs of a subnet: how long counting and predicting take, and how far predicted times are from measured ones.

``pytest benchmarks/bench_cost.py`` times one call of each; ``python benchmarks/bench_cost.py mobilenet_v2 60`` measures
a network for 60 seconds and prints predicted and measured times of random subnets.
"""

from __future__ import annotations

import sys

import pytest
import torch

import fastslim
from fastslim.cost import LatencyTable, Stopwatch, cost_of

NETWORKS = ("resnet50", "mobilenet_v2")


def supernet(name):
    model = fastslim.models.create_model(name).eval()
    return model, fastslim.convert(model, torch.zeros(1, 3, 224, 224), seed=0).mutator


class Once(Stopwatch):
    """Layers take a second each, so that predicting can be timed without measuring."""

    def seconds(self, run):
        return 1.0


@pytest.mark.parametrize("name", NETWORKS)
def test_counting(benchmark, name):
    model, mutator = supernet(name)
    subnet = mutator.sample_choices()
    assert benchmark(cost_of, model, subnet).multiply_adds > 0
    assert benchmark.stats.stats.median < 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_predicting(benchmark, name):
    model, mutator = supernet(name)
    table = LatencyTable(model, cache=False, stopwatch=Once()).measure()
    subnet = mutator.sample_choices()
    assert benchmark(table.predict, subnet) > 0
    assert benchmark.stats.stats.median < 1e-3


def main(name, seconds):
    """Measures, checks and prints."""
    model, _ = supernet(name)
    table = LatencyTable(model).measure(float(seconds), progress=True)
    print(f"{name}, 224 pixels, grid level {table.level}, copied: {sorted(table.copied) or 'none'}")
    print(table.check(10))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
