"""`search.greedy` and `search.evolution`: budgets, what a score is, and that the algorithm is left as it was."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import search_cases as cases
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import fastslim
from fastslim.cost import LatencyTable, Stopwatch
from fastslim.errors import FastslimRuntimeError, FastslimTypeError, FastslimValueError
from fastslim.search import evolution, greedy

EVOLUTION = {"population_size": 8, "generations": 3, "top_k": 3}


@pytest.fixture
def algo() -> fastslim.AutoSlim:
    return cases.toy_algo()


@pytest.fixture
def data() -> list:
    return cases.toy_data()


def search_both(*args, **options):
    yield greedy(*args, progress=False, **options)
    yield evolution(*args, progress=False, **EVOLUTION, **options)


def test_budgets_are_fractions_up_to_one_and_absolute_above(algo, data) -> None:
    full = algo.subnet_cost(algo.mutator.max_choices)
    budgets = {"flops": [0.25, 1.0, 30_000], "params": 0.4}
    for report in search_both(algo, data, budgets):
        asked = [(found.cost, found.budget, found.limit) for found in report.found]
        assert asked == [
            ("flops", 1.0, full.multiply_adds),
            ("flops", 30_000, 30_000),
            ("flops", 0.25, 0.25 * full.multiply_adds),
            ("parameters", 0.4, 0.4 * full.parameters),
        ]
        for found in report.found:
            cost = algo.subnet_cost(found.subnet)
            assert found.costs == {
                "flops": cost.multiply_adds,
                "parameters": cost.parameters,
                "memory": cost.peak_activation_bytes,
            }
            assert found.costs[found.cost] <= found.limit
        assert report.best("multiply_adds", 0.25) == report.best("flops", 0.25 * full.multiply_adds)
        assert report.full.subnet == algo.mutator.max_choices


def test_memory_and_predicted_latency_are_costs_like_the_others(algo, data) -> None:
    class Table:
        def predict(self, subnet: dict[str, int]) -> float:
            return 2.0 + sum(subnet.values()) / 10

    full = 2.0 + sum(algo.mutator.max_choices.values()) / 10
    for report in search_both(algo, data, {"latency": [0.8, 3.0], "memory": 3000}, latency=Table()):
        assert [(found.cost, found.limit) for found in report.found] == [
            ("latency", 0.8 * full),
            ("latency", 3.0),
            ("memory", 3000),
        ]
        for found in report.found:
            assert found.costs["latency"] == Table().predict(found.subnet)
            assert found.costs["memory"] == algo.subnet_cost(found.subnet).peak_activation_bytes
            assert found.costs[found.cost] <= found.limit
        assert report.best("latency", 3.0) == report.found[1].subnet
        header, _, *rows = str(report).splitlines()[1:]
        assert "bytes of activations" in header
        assert "latency" in header
        assert rows[2].startswith("latency 3 ms")


class Flops(Stopwatch):
    """A nanosecond a FLOP: other tests run beside this one."""

    name = "flops"

    def seconds(self, run: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter:
            run()
        return 1e-9 * (1 + counter.get_total_flops())


def test_a_latency_table_is_searched_with(algo, data) -> None:
    table = LatencyTable(algo, cache=False, stopwatch=Flops()).measure()
    report = greedy(algo, data, {"latency": 0.5, "flops": 0.5}, latency=table, progress=False)
    assert report.found[0].costs["latency"] <= 0.5 * report.full.costs["latency"]
    assert report.best("latency", 0.5) == report.best("flops", 0.5), "this clock counts the same"


def test_no_subnet_is_evaluated_twice_by_all_searches_of_a_call(algo, data) -> None:
    calls = []

    def metric(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(algo.mutator.current_choices.items()))
        return (output.argmax(1) == targets).float()

    for report in search_both(algo, data, {"flops": [0.5, 0.2], "parameters": [0.5]}, metric=metric):
        assert len(calls) == cases.BATCHES * len(report.evaluated)
        assert len(set(calls)) == len(report.evaluated)
        calls.clear()


def test_all_budgets_of_a_greedy_search_lie_on_one_way_down(algo, data) -> None:
    together = greedy(algo, data, {"flops": [0.6, 0.3], "parameters": [0.3]}, progress=False)
    for cost, budget in (("flops", 0.6), ("flops", 0.3), ("parameters", 0.3)):
        alone = greedy(algo, data, {cost: budget}, progress=False)
        assert together.best(cost, budget) == alone.best(cost, budget)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("calibrated", [True, False])
def test_the_algorithm_is_left_as_it_was(algo, data, training, calibrated) -> None:
    algo.train(training)
    algo.architecture.first_bn.eval()
    subnet = algo.uniform_subnet(0.5)
    fastslim.calibrate_batch_norm(algo, data, [subnet])
    algo.set_subnet(subnet)
    before, probe = cases.snapshot(algo), data[0][0]
    algo.eval()
    expected = algo(probe)
    for module, mode in zip(algo.modules(), before[1].values(), strict=True):
        module.training = mode
    for _ in search_both(algo, data, {"flops": 0.3}, calibration=data if calibrated else None):
        cases.assert_unchanged(algo, before)
    algo.eval()
    assert torch.equal(algo(probe), expected), "the statistics calibrated before are still in use"


@pytest.mark.filterwarnings("error")
def test_what_a_calibrated_search_finds_can_be_used_and_exported_at_once(algo, data) -> None:
    twin = cases.toy_algo()
    report = greedy(algo, data, {"flops": [0.6, 0.3]}, calibration=data, progress=False)
    for budget in (0.6, 0.3):
        subnet = report.best("flops", budget)
        fastslim.calibrate_batch_norm(twin, data, [subnet])
        twin.eval().set_subnet(subnet)
        algo.eval().set_subnet(subnet)
        assert torch.equal(algo(data[0][0]), twin(data[0][0]))
        exported = fastslim.export_subnet(algo, subnet).eval()  # without a warning
        torch.testing.assert_close(exported(data[0][0]), twin(data[0][0]))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_algorithm_is_left_as_it_was_when_the_metric_fails(algo, data, error) -> None:
    before, calls = cases.snapshot(algo), []

    def metric(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 9:
            raise error("stop")
        return (output.argmax(1) == targets).float()

    with pytest.raises(error, match="stop"):
        greedy(algo, data, {"flops": 0.3}, metric=metric, calibration=data, progress=False)
    cases.assert_unchanged(algo, before)


def test_the_generators_of_torch_draw_on_as_if_there_had_been_no_search(algo) -> None:
    images, labels = cases.toy_data(1)[0]
    loader = DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = greedy(algo, loader, {"flops": 0.5}, progress=False)
    assert torch.equal(torch.rand(3), expected)
    second = greedy(algo, loader, {"flops": 0.5}, progress=False)
    assert first == second, "a shuffling loader gives the same batches for the same seed"


def test_a_metric_may_give_scores_or_the_mean_of_the_batch(algo, data) -> None:
    data = [*data, tuple(tensor[:7] for tensor in data[0])]  # the mean is weighted by the batch's size

    def scores(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return -nn.functional.cross_entropy(output, targets, reduction="none")

    def mean(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return -nn.functional.cross_entropy(output, targets)

    def number(output: torch.Tensor, targets: torch.Tensor) -> float:
        return mean(output, targets).item()

    reports = [greedy(algo, data, {"flops": 0.3}, metric=m, progress=False) for m in (scores, mean, number)]
    assert [report.metric for report in reports] == ["scores", "mean", "number"]
    for report in reports[1:]:
        assert report.best("flops", 0.3) == reports[0].best("flops", 0.3)
        assert report.full.score == pytest.approx(reports[0].full.score, abs=1e-6)


class Detector(nn.Module):
    """Returns no logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.last = nn.Conv2d(8, 3, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(N, 1, 6, 6) -> a dict."""
        return {"map": self.last(self.conv(x).relu())}


def test_an_output_that_is_no_logits_needs_a_metric(data) -> None:
    algo = fastslim.AutoSlim(architecture=Detector(), example_inputs=torch.randn(2, 1, 6, 6), divisor=2)
    with pytest.raises(
        FastslimTypeError, match=r"returns dict, not a tensor of logits; pass metric=.*metric\(output, targets\)"
    ):
        greedy(algo, data, {"flops": 0.5}, progress=False)
    report = greedy(algo, data, {"flops": 0.5}, metric=lambda out, _: -out["map"].square().mean(), progress=False)
    assert report.found[0].costs["flops"] <= 0.5 * report.full.costs["flops"]


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (torch.rand(24, 3), FastslimTypeError, r"class indices as targets, but they are torch.float32; pass metric="),
        (None, FastslimTypeError, "class indices as targets, but they are NoneType; pass metric="),
        (torch.zeros(24, 2, dtype=torch.long), FastslimValueError, r"\(24, 3\) is no set of logits.*\(24, 2\)"),
    ],
)
def test_targets_that_are_no_classes_need_a_metric(algo, targets, error, message) -> None:
    with pytest.raises(error, match=message):
        greedy(algo, [(torch.randn(24, 1, 6, 6), targets)], {"flops": 0.5}, progress=False)


def test_a_metric_that_is_nan_names_the_subnet(algo, data) -> None:
    def metric(output: torch.Tensor, targets: torch.Tensor) -> float:
        return math.nan if min(algo.mutator.current_choices.values()) < 6 else 1.0

    with pytest.raises(FastslimRuntimeError, match=r"the score is nan for the subnet \{'first"):
        greedy(algo, data, {"flops": 0.3}, metric=metric, progress=False)


def test_a_network_whose_output_is_nan_has_no_accuracy(algo, data) -> None:
    with torch.no_grad():
        algo.architecture.head.bias[0] = math.nan
    with pytest.raises(FastslimRuntimeError, match="the score is nan"):
        greedy(algo, data, {"flops": 0.3}, progress=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budgets": {"flop": 0.5}}, FastslimValueError, "no cost is called 'flop'; did you mean 'flops'"),
        ({"budgets": {"flops": []}}, FastslimValueError, "there is no budget"),
        ({"budgets": {}}, FastslimValueError, "there is no budget"),
        ({"budgets": [0.5]}, FastslimTypeError, "a dict such as .*but got list"),
        ({"budgets": {"flops": "0.5"}}, FastslimTypeError, "a budget should be a number, but got '0.5'"),
        ({"budgets": {"flops": [0.5, 0]}}, FastslimValueError, "the budget 0 should be above 0"),
        ({"budgets": {"flops": [0.5, math.nan]}}, FastslimValueError, "the budget nan should be above 0"),
        (
            {"budgets": {"flops": [0.5, 0.01]}},
            FastslimValueError,
            r"budget 0.01 of flops is below the smallest subnet, which has 7134 \(0.0888 of the full network\)",
        ),
        ({"budgets": {"latency": 0.5}}, FastslimValueError, r"needs a table of the machine: latency=.*LatencyTable"),
        ({"val_loader": []}, FastslimValueError, "the validation loader yields no samples"),
        ({"calibration": iter(())}, FastslimValueError, "the calibration loader yields no samples"),
        ({"val_loader": 3}, FastslimTypeError, "int cannot be iterated"),
        ({"num_batches": 0}, FastslimValueError, "num_batches=0 should be at least 1"),
        ({"num_batches": 1.5}, FastslimTypeError, "num_batches should be a whole number"),
        ({"algo": nn.Linear(3, 3)}, FastslimTypeError, "algo should be a fastslim.AutoSlim, but got Linear"),
        ({"resume": True}, FastslimValueError, r"resume=True needs the folder of the search: run="),
        (
            {"val_loader": [(torch.randn(1, 1, 6, 6), torch.zeros(1, dtype=torch.long))]},
            FastslimValueError,
            "a validation batch holds a single sample.*calibration=",
        ),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(algo, data, options, error, message) -> None:
    before = cases.snapshot(algo)
    with pytest.raises(error, match=message):
        greedy(**{"algo": algo, "val_loader": data, "budgets": {"flops": 0.5}, "progress": False, **options})
    cases.assert_unchanged(algo, before)


def test_a_network_without_a_choice_is_refused(algo, data) -> None:
    algo.mutator.fix_channel_mutables()
    with pytest.raises(FastslimValueError, match="nothing to search"):
        greedy(algo, data, {"flops": 1.0}, progress=False)


def test_the_best_subnet_can_be_exported(algo, data) -> None:
    report = greedy(algo, data, {"flops": 0.5}, calibration=data, progress=False)
    fastslim.calibrate_batch_norm(algo, data, [report.best("flops", 0.5)])
    small = fastslim.export_subnet(algo, report.best("flops", 0.5))
    assert sum(p.numel() for p in small.parameters()) == report.found[0].costs["parameters"]


def test_progress_is_lines_where_there_is_no_terminal(algo, data, capsys) -> None:
    report = greedy(algo, data, {"flops": [0.5, 0.25]})
    assert capsys.readouterr().out == f"flops: found 2 subnets, {len(report.evaluated)} evaluated\n"
    greedy(algo, data, {"flops": 0.5}, progress=False)
    assert capsys.readouterr().out == ""


def test_progress_is_a_bar_on_a_terminal(algo, data, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for method in ("greedy", "evolution"):
        options = {} if method == "greedy" else EVOLUTION
        getattr(fastslim.search, method)(algo, data, {"flops": [0.5, 0.25], "params": 0.5}, **options)
        shown = capsys.readouterr().out
        assert f"{method} flops" in shown
        assert "100%" in shown
