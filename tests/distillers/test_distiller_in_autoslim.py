"""A distiller inside AutoSlim: each source is seen in every pass, past the plan where a plan would hide it."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastslim


def soften(x: Tensor) -> Tensor:
    return x / 2


def gain(features: Tensor) -> Tensor:
    return features.abs().mean()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.bn(self.conv(x))).mean((2, 3))
        return soften(self.head(features)) * gain(features)


def algorithm(**distiller):
    distiller = {"type": "ConfigurableDistiller"} | distiller
    algo = fastslim.AutoSlim(
        architecture=Net(), distiller=distiller, example_inputs=torch.zeros(2, 3, 8, 8), divisor=4, seed=0
    )
    return algo.double().train()


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 8, 8, generator=random, dtype=torch.float64), torch.randint(5, (6,), generator=random)


def kl_between(source, kind="ModuleOutputs"):
    recorder = {"type": kind, "source": source}
    return {
        "student_recorders": {"it": recorder},
        "teacher_recorders": {"it": recorder},
        "distill_losses": {"loss_kl": {"type": "KLDivergence", "tau": 2.0}},
    }


def expected_kl(algo, images, source, delivered=False):
    """tau^2 KL between the full width and the smallest, from the network's own forward."""
    records, gains = [], []
    for widths in (algo.mutator.max_choices, algo.mutator.min_choices):
        algo.set_subnet(widths)
        net, own = algo.architecture, {}
        features = F.relu(net.bn(net.conv(images))).mean((2, 3)).detach()
        own["head"] = net.head(features).detach()
        own["soften"] = own["head"] / 2
        gains.append(gain(features))
        own[""] = own["soften"] * gains[0 if delivered else -1]
        records.append(own[source.split(".")[-1]] / 2.0)
    return 4 * F.kl_div(F.log_softmax(records[1], 1), F.softmax(records[0], 1), reduction="batchmean")


@pytest.mark.parametrize(
    ("source", "kind", "planned"),
    [
        ("head", "ModuleOutputs", True),
        ("", "ModuleOutputs", False),
        (f"{__name__}.soften", "FunctionOutputs", False),
    ],
    ids=["module", "model", "function"],
)
def test_every_source_is_seen_in_every_pass(batch, source, kind, planned):
    algo = algorithm(**kl_between(source, kind))
    assert (algo._plan is not None) == planned
    truth = expected_kl(copy.deepcopy(algo), batch[0], source)
    losses = algo.train_step(batch, torch.optim.SGD(algo.parameters(), 0.1))
    torch.testing.assert_close(losses["min_subnet.loss_kl"], truth)
    assert set(losses) == {
        "max_subnet.loss",
        *(f"{name}.loss_kl" for name in ("min_subnet", "random_subnet_0", "random_subnet_1")),
    }
    assert all(not r.data_buffer for r in algo.distiller._recorders())


def test_deliveries_reach_all_students(batch):
    delivery = {"type": "FunctionOutputs", "func_path": f"{__name__}.gain"}
    algo = algorithm(distill_deliveries={"gain": delivery}, **kl_between(""))
    truth = expected_kl(copy.deepcopy(algo), batch[0], "", delivered=True)
    losses = algo.train_step(batch, torch.optim.SGD(algo.parameters(), 0.1))
    torch.testing.assert_close(losses["min_subnet.loss_kl"], truth)
    assert "random_subnet_1.loss_kl" in losses


def test_a_distillers_own_parameters_are_trained(batch):
    algo = algorithm(
        **kl_between("head"),
        connectors={"mix": {"type": nn.Linear, "in_features": 5, "out_features": 5}},
        loss_forward_mappings={
            "loss_kl": {
                "preds_S": {"recorder": "it", "from_student": True, "connector": "mix"},
                "preds_T": {"recorder": "it", "from_student": False},
            }
        },
    )
    before = algo.distiller.connectors["mix"].weight.clone()
    algo.train_step(batch, torch.optim.SGD(algo.parameters(), 0.1))
    assert not torch.equal(algo.distiller.connectors["mix"].weight, before)
