"""Two processes on the CPU train one supernet: equal weights and widths, the mean gradient of both halves."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_loop
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmengine_rank import SGD, STEPS
from mmengine_toys import ModeToy, PlainToy, batch, by_hand, make, widths_of_next_step
from torch import Tensor, nn

from fastslim import errors
from fastslim.integrations.mmengine import AutoSlim, AutoSlimDDP, SlimmableNetworkDDP

Results = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What both processes have to tell."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("mmengine_rank.py")
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(port), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (script.parent, script.parents[1])))},
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text in zip(started, said, strict=True):
        assert process.returncode == 0, text[-4000:]
    return tuple(torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2))


def mean_of_two_halves(
    plain: nn.Module, widths: Callable[[int], list[dict[str, int]]], counts: int, divide: bool = True
) -> dict[str, Tensor]:
    """One process that runs every pass on both halves and steps on the mean of their gradients."""
    optimizer = torch.optim.SGD(plain.parameters(), SGD["lr"], SGD["momentum"])
    passes = 0
    for step in range(STEPS):
        nets = [plain_loop.Net(plain) for _ in range(2)]
        for name, buffer in plain.named_buffers():  # the first process's statistics are everyone's
            nets[1].tensors[name] = buffer.clone()
        teachers: list[Any] = [None, None]
        for chosen in widths(step):
            for half, net in enumerate(nets):
                data = batch(seed=2 * step + half)
                net.widths = chosen
                output = by_hand(net, data["inputs"])
                if teachers[half] is None:
                    loss, teachers[half] = F.cross_entropy(output, data["data_samples"]), output.detach().softmax(1)
                else:
                    loss = F.kl_div(output.log_softmax(1), teachers[half], reduction="batchmean")
                (loss / 2 / (counts if divide else 1)).backward()
            passes += 1
            if passes % counts == 0:
                optimizer.step()
                optimizer.zero_grad()
    return plain.state_dict()


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for key, value in theirs.items():
        if value.is_floating_point():
            torch.testing.assert_close(ours[key], value, rtol=1e-11, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("counts", [1, 4, 8])
def test_two_processes_equal_one_that_averages_both_halves(ranks: Results, counts: int) -> None:
    first, second = (one[f"wrapped {counts}"] for one in ranks)
    algo, plain = make(ModeToy)

    def widths(step: int) -> list[dict[str, int]]:
        chosen = widths_of_next_step(algo)
        for _ in range(2):
            algo.sample_subnet()
        return chosen

    assert_equal(first["state"], mean_of_two_halves(plain, widths, counts))
    assert first["losses"] != second["losses"]  # each on its own half


def test_plain_torch_trains_as_one_process_on_the_sum_of_passes(ranks: Results) -> None:
    first = ranks[0]["plain"]
    plain = PlainToy().double()
    plain.load_state_dict(first["start"])
    units = list(first["widths"][0])
    assert [name.split("_(")[0] for name in units] == ["conv1", "conv2"]
    drawn = iter(first["widths"])

    def widths(step: int) -> list[dict[str, int]]:
        most, least = {"conv1": 8, "conv2": 16}, {"conv1": 2, "conv2": 2}  # i/12 of 8 and 16, in twos
        random = [{"conv1": choice[units[0]], "conv2": choice[units[1]]} for choice in (next(drawn), next(drawn))]
        return [most, least, *random]

    assert_equal(first["state"], mean_of_two_halves(plain, widths, 4, divide=False))


@pytest.mark.parametrize("name", ["wrapped 1", "wrapped 4", "wrapped 8", "plain", "slimmable"])
def test_both_end_with_the_same_weights(ranks: Results, name: str) -> None:
    first, second = (one[name]["state"] for one in ranks)
    for key, value in first.items():
        assert "running" in key or torch.equal(value, second[key]), key
    assert first.keys() == second.keys()


@pytest.mark.parametrize("name", ["wrapped 4", "plain", "runner"])
def test_both_draw_the_same_random_widths(ranks: Results, name: str) -> None:
    first, second = (one[name]["widths"] for one in ranks)
    assert first == second
    assert len({str(choice) for choice in first}) > 2


def test_a_runner_trains_with_two_processes(ranks: Results) -> None:
    first, second = (one["runner"] for one in ranks)
    assert first["model"] == "AutoSlimDDP"
    for key, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][key]), key
    assert first["metrics"].keys() == second["metrics"].keys()
    assert first["metrics"]["max_subnet.accuracy/top1"] > 60


def test_two_processes_search_as_one(ranks: Results) -> None:
    """Each evaluates its part of the images, and all decide on the metrics of all."""
    first, second = (one["runner"] for one in ranks)
    assert first["found"] == second["found"]
    assert first["scores"] == second["scores"]
    assert next(iter(first["scores"].values())) > 60


def test_a_plain_wrapper_is_refused(ranks: Results) -> None:
    assert "model_wrapper_cfg=dict(type='fastslim.AutoSlimDDP')" in ranks[0]["refused"]


def test_a_wrapper_takes_its_own_model_only() -> None:
    algo: AutoSlim = make()[0]
    with pytest.raises(
        errors.FastslimTypeError, match="SlimmableNetworkDDP wraps a SlimmableNetwork, but got AutoSlim"
    ):
        SlimmableNetworkDDP(algo)


def test_synchronised_batch_norms_in_the_place_of_slim_ones_are_refused() -> None:
    algo = nn.SyncBatchNorm.convert_sync_batchnorm(make()[0])
    with pytest.raises(errors.FastslimValueError, match="2 slim layers, 'norm1' for one.*leave sync_bn out"):
        AutoSlimDDP(algo)


def test_without_processes_the_wrapper_says_what_to_start() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    with pytest.raises((errors.FastslimRuntimeError, ValueError, RuntimeError), match="process group"):
        AutoSlimDDP(make()[0])
