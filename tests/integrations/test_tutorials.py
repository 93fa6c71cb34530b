"""MMRazor's two tutorials, completed to programs (docs/examples/): they run, learn, and equal fastslim's own step."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from fastslim.data.digits import digits

EXAMPLES = Path(__file__).resolve().parents[2] / "docs/examples"


@pytest.fixture(scope="module")
def one_x() -> dict:
    return runpy.run_path(str(EXAMPLES / "mmrazor_1x.py"))


@pytest.fixture(scope="module")
def zero_x() -> dict:
    return runpy.run_path(str(EXAMPLES / "mmrazor_0x.py"))


def accuracy(network: torch.nn.Module) -> float:
    images, labels = digits()[1].tensors
    with torch.no_grad():
        return float((network.train()(images).argmax(1) == labels).double().mean())


@pytest.fixture
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def test_the_tutorials_own_algorithm_and_fastslims_take_the_same_steps(one_x, double) -> None:
    (own, own_losses), (ours, our_losses) = (one_x["train"](kind, epochs=1) for kind in ("MyAutoSlim", "AutoSlim"))
    assert list(own_losses) == list(our_losses)
    assert our_losses == pytest.approx(own_losses, abs=1e-9)
    theirs = own.architecture.state_dict()
    for name, mine in ours.architecture.state_dict().items():
        torch.testing.assert_close(mine, theirs[name], rtol=0, atol=1e-9, msg=name)


def test_the_first_tutorial_learns(one_x) -> None:
    algo, losses = one_x["train"]("AutoSlim", epochs=5)
    assert list(losses) == [
        "max_subnet.loss", "min_subnet.loss_kl", "random_subnet_0.loss_kl", "random_subnet_1.loss_kl",
    ]  # fmt: skip
    algo.set_max_subnet()
    assert accuracy(algo.architecture) > 0.9
    algo.set_min_subnet()
    assert accuracy(algo.architecture) > 0.6


def test_the_second_tutorial_pretrains_and_retrains(zero_x) -> None:
    torch.manual_seed(0)
    build = zero_x["ALGORITHMS"].build
    supernet = build(zero_x["algorithm"]())
    outputs = zero_x["train"](supernet, epochs=5)
    assert outputs["num_samples"] == 64
    assert list(outputs["log_vars"]) == [
        "loss", "max_subnet.loss", "min_subnet.loss_kd.0", "random_subnet_0.loss_kd.0", "random_subnet_1.loss_kd.0",
    ]  # fmt: skip
    assert accuracy(supernet.architecture) > 0.9
    supernet.set_min_subnet()
    assert accuracy(supernet.architecture) > 0.6

    supernet.set_subnet(supernet.uniform_subnet(0.5))
    config = {**zero_x["algorithm"](), "retraining": True, "channel_cfg": supernet.mutator.export_subnet()}
    alone = build(config)
    assert alone.architecture.conv2.weight.shape[:2] == (16, 8)
    assert list(zero_x["train"](alone, epochs=5)["log_vars"]) == ["loss"]
    assert accuracy(alone.architecture) > 0.9
