"""Predicted times, on a clock that counts operations instead of seconds: there, layers add up to networks exactly."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cost_nets import NETS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastslim
from fastslim.cost import LatencyTable, Stopwatch
from fastslim.cost import latency as latency_module
from fastslim.cost.networks import fitted
from fastslim.errors import FastslimRuntimeError, FastslimTypeError, FastslimValueError
from fastslim.models import create_model


class Made(TorchDispatchMode):
    """Counts the entries of all results that are new memory."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage()._cdata
            for leaf in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        first = result[0] if isinstance(result, (tuple, list)) else result
        if first.untyped_storage()._cdata not in given or "relu_" in str(func):
            self.entries += first.numel()
        return result


class Counter(Stopwatch):
    """Seconds are a nanosecond a FLOP and ten an entry of a result; `measured` counts the measurements."""

    name = "counter"

    def __init__(self) -> None:
        super().__init__()
        self.measured = 0

    def seconds(self, run: Callable[[], Any]) -> float:
        self.measured += 1
        with FlopCounterMode(display=False) as flops:
            run()
        with Made() as made:
            run()
        return 1e-9 * flops.get_total_flops() + 1e-8 * made.entries


class Unused(Counter):
    """Must not be asked."""

    def seconds(self, run: Callable[[], Any]) -> float:
        raise AssertionError("measured again")


def supernet(name: str = "concat", pixels: int = 8, samples: int = 1, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = NETS[name]() if name in NETS else create_model(name, num_classes=10, small_images=True, width_mult=0.25)
    fastslim.convert(model.eval(), torch.zeros(samples, 3, pixels, pixels), divisor=4, seed=1, **options)
    return model


def mutator_of(model: nn.Module) -> Any:
    return fastslim.mutators.mutator_of(model)


@pytest.mark.parametrize("name", [*NETS, "resnet50", "mobilenet_v2"])
def test_times_of_layers_add_up_to_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_module, "STAGES", ((1, 1),))
    table = LatencyTable(supernet(name), cache=False, stopwatch=Counter())
    table.measure()
    report = table.check(4, rounds=1)
    assert report.largest_error < 1e-6
    assert report.rank_correlation == pytest.approx(1.0)
    assert table.copied == set()


@pytest.mark.parametrize("options", [{"batch_size": 3}, {"channels_last": True}, {"dtype": torch.float64}])
def test_the_form_in_which_networks_run_is_the_callers(options: dict[str, Any]) -> None:
    model = supernet(samples=2)
    table = LatencyTable(model, cache=False, stopwatch=Counter(), **options).measure()
    assert table.check(3, rounds=1).largest_error < 1e-6
    one = LatencyTable(model, cache=False, stopwatch=Counter()).measure().predict({})
    assert table.predict({}) == pytest.approx(options.get("batch_size", 1) * one)


def test_a_constant_that_layers_do_not_show_is_fitted() -> None:
    class WithConstant(Counter):
        def seconds(self, run: Callable[[], Any]) -> float:
            own = super().seconds(run)
            return 3 * own + 1e-3 if "Networks.call" in run.__qualname__ else own

    table = LatencyTable(supernet(), cache=False, stopwatch=WithConstant()).measure()
    assert table._fit == (pytest.approx(3), pytest.approx(1e-3))
    assert table.check(3, rounds=1).largest_error < 1e-6


def test_a_slower_machine_is_noticed_by_the_check() -> None:
    class Slower(Counter):
        factor = 1.0

        def seconds(self, run: Callable[[], Any]) -> float:
            return self.factor * super().seconds(run)

    stopwatch = Slower()
    table = LatencyTable(supernet(), cache=False, stopwatch=stopwatch).measure()
    stopwatch.factor = 2.0
    report = table.check(3, rounds=1)
    assert report.drift == pytest.approx(2)
    assert report.median_error == pytest.approx(0.5) and report.steady_largest_error < 1e-6


def test_fit_never_has_a_negative_part() -> None:
    assert fitted([1.0, 2.0, 3.0], [2.5, 4.5, 6.5]) == (pytest.approx(2), pytest.approx(0.5))
    factor, constant = fitted([1.0, 2.0, 3.0], [1.0, 3.0, 5.0])
    assert factor > 0 and constant == 0


def test_nothing_is_measured_twice(tmp_path: Any) -> None:
    model = supernet()
    first = LatencyTable(model, cache=tmp_path, stopwatch=Counter()).measure()
    again = LatencyTable(supernet(), cache=tmp_path, stopwatch=Unused())
    assert again.predict({}) == first.predict({})
    assert again.measure().predict({}) == first.predict({})


def test_networks_share_the_layers_they_have_in_common(tmp_path: Any) -> None:
    first, second = Counter(), Counter()
    LatencyTable(supernet(), cache=tmp_path, stopwatch=first).measure()
    LatencyTable(supernet(choices=[0.25, 0.5, 1.0]), cache=tmp_path, stopwatch=second).measure()
    alone = Counter()
    LatencyTable(supernet(choices=[0.25, 0.5, 1.0]), cache=False, stopwatch=alone).measure()
    assert 0 < second.measured < 0.7 * alone.measured


def test_later_measurements_outvote_a_disturbed_one() -> None:
    rng = random.Random(0)

    class Disturbed(Counter):
        def seconds(self, run: Callable[[], Any]) -> float:
            return super().seconds(run) * rng.choice([1, 1, 1, 1, 10])

    table = LatencyTable(supernet(), cache=False, stopwatch=Disturbed()).measure()
    assert {len(samples) for samples in table._file.samples.values()} == {5}
    calm = LatencyTable(supernet(), cache=False, stopwatch=Counter()).measure()
    assert table.predict({}) == pytest.approx(calm.predict({}), rel=0.05)


def test_the_time_to_spend_is_kept_and_what_was_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count()
    stopwatch = Counter()
    table = LatencyTable(supernet(), cache=False, stopwatch=stopwatch)
    monkeypatch.setattr(latency_module.time, "monotonic", lambda: float(next(seconds)))
    table.measure(seconds=20)
    assert 5 < stopwatch.measured <= 20
    with pytest.raises(FastslimRuntimeError, match=r"not everything is measured yet \(\d+ of \d+ kinds"):
        table.predict({})
    for _ in range(100):
        if table.level:
            break
        table.measure(seconds=20)
    assert table.predict({}) > 0


def test_what_was_measured_before_an_interruption_is_kept(tmp_path: Any) -> None:
    class Interrupted(Counter):
        def seconds(self, run: Callable[[], Any]) -> float:
            if self.measured == 12:
                raise KeyboardInterrupt
            return super().seconds(run)

    with pytest.raises(KeyboardInterrupt):
        LatencyTable(supernet(), cache=tmp_path, stopwatch=Interrupted()).measure()
    assert len(LatencyTable(supernet(), cache=tmp_path, stopwatch=Counter())._file.samples) == 12


def test_progress_is_shown() -> None:
    shown: list[tuple[float, str]] = []
    LatencyTable(supernet(), cache=False, stopwatch=Counter()).measure(progress=lambda *now: shown.append(now))
    parts = [part for part, _ in shown]
    assert parts == sorted(parts) and 0 <= parts[0] and parts[-1] == 1
    assert any("Conv2d" in what for _, what in shown) and any("network" in what for _, what in shown)


class Transposed(nn.Module):
    """A result that is copied by ``reshape``, with the number of channels as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 4, 4) to logits."""
        return self.b(self.a(x).transpose(1, 2).reshape(-1, 8 * 16))


def test_what_cannot_be_called_alone_is_timed_as_a_copy_and_named() -> None:
    model = Transposed()
    fastslim.convert(model, torch.zeros(1, 3, 4, 4), choices=[0.5, 1.0], divisor=2)
    table = LatencyTable(model, cache=False, stopwatch=Counter()).measure()
    assert table.copied == {"Tensor.reshape"}
    assert table.check(2, rounds=1).largest_error < 1e-6


def test_a_real_clock_gives_a_report() -> None:
    model = supernet("grouped", pixels=8)
    before = mutator_of(model).current_choices
    stopwatch = Stopwatch(min_seconds=1e-5, samples=1, warm_up=1)
    table = LatencyTable(model, cache=False, stopwatch=stopwatch).measure(seconds=30)
    assert table.level == 4
    report = table.check(3, rounds=2)
    assert [row.measured for row in report.rows] == sorted(row.measured for row in report.rows)
    assert all(row.predicted > 0 and row.measured > 0 and row.multiply_adds > 0 for row in report.rows)
    assert str(report).startswith(f"3 subnets on {table.describe()}\nrelative error: median ")
    assert mutator_of(model).current_choices == before
    assert table.time_network(report.rows[0].subnet) > 0


def test_bad_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = supernet()
    with pytest.raises(FastslimTypeError, match="LatencyTable takes an AutoSlim"):
        LatencyTable(nn.Linear(2, 2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(FastslimValueError, match="cannot be measured on 'cuda': there are 0 CUDA devices here. Use"):
        LatencyTable(model, device="cuda")
    with pytest.raises(FastslimValueError, match="device='gpu' is not a device: use 'cpu', 'cuda'"):
        LatencyTable(model, device="gpu")
    with pytest.raises(FastslimValueError, match="cannot be measured on 'meta'"):
        LatencyTable(model, device="meta")
    with pytest.raises(FastslimValueError, match="batch_size=0: must be a whole number of at least 1"):
        LatencyTable(model, batch_size=0)
    with pytest.raises(FastslimValueError, match="on the meta device and has no weights to run with"):
        LatencyTable(supernet().to("meta"))
    table = LatencyTable(model, cache=False, stopwatch=Counter())
    with pytest.raises(FastslimValueError, match="seconds=0: must be above 0"):
        table.measure(0)
    table.measure()
    with pytest.raises(FastslimValueError, match="at least 2 subnets"):
        table.check(1)
    with pytest.raises(FastslimValueError, match="no unit is called 'join'"):
        table.predict({"join": 4})


def test_another_number_of_threads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    table = LatencyTable(supernet(), cache=False, stopwatch=Counter()).measure()
    own = table.key["threads"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: own + 1)
    for use in (table.measure, table.check):
        with pytest.raises(FastslimRuntimeError, match=f"this table is for {own} threads, and torch now has {own + 1}"):
            use()


@pytest.mark.gpu
def test_a_gpu_is_timed() -> None:
    stopwatch = Stopwatch(min_seconds=1e-4, samples=3, wait=torch.cuda.synchronize)
    table = LatencyTable(supernet("grouped"), device="cuda", cache=False, stopwatch=stopwatch).measure(seconds=60)
    assert table.key["hardware"] == torch.cuda.get_device_name()
    report = table.check(3, rounds=2)
    assert all(row.predicted > 0 and row.measured > 0 for row in report.rows)
