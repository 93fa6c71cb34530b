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


def step(algo, batch):
    return algo.train_step(batch, torch.optim.SGD(algo.parameters(), 0.0))


class Difference(nn.Module):
    """A loss that knows nothing of fastslim."""

    def forward(self, ours: Tensor, theirs: Tensor, scale: float = 1.0) -> Tensor:
        return scale * (ours - theirs).square().sum()


def test_an_ordinary_module_is_a_loss_and_one_recorder_feeds_two(batch):
    record = {"recorder": "it"}
    algo = algorithm(
        **kl_between("head")
        | {
            "distill_losses": {"loss_kl": {"type": "KLDivergence", "loss_weight": 0.5}, "loss_own": Difference()},
            "loss_forward_mappings": {
                "loss_kl": {
                    "preds_S": record | {"from_student": True},
                    "preds_T": record | {"from_student": False},
                },
                "loss_own": {"ours": record | {"from_student": True}, "theirs": record | {"from_student": False}},
            },
        }
    )
    plain, logits = copy.deepcopy(algo), []
    for widths in (plain.mutator.max_choices, plain.mutator.min_choices):
        plain.set_subnet(widths)
        net = plain.architecture
        logits.append(net.head(F.relu(net.bn(net.conv(batch[0]))).mean((2, 3))).detach())
    losses = step(algo, batch)
    torch.testing.assert_close(losses["min_subnet.loss_own"], (logits[1] - logits[0]).square().sum())
    kl = F.kl_div(logits[1].log_softmax(1), logits[0].softmax(1), reduction="batchmean")
    torch.testing.assert_close(losses["min_subnet.loss_kl"], 0.5 * kl)


class Scaled(Net):
    """A method and a function see the features on their way to the head, the method twice."""

    def damp(self, x: Tensor, factor: float = 0.5) -> Tensor:
        return x * factor

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.bn(self.conv(x))).mean((2, 3))
        return soften(self.head(self.damp(self.damp(features, factor=0.25))))


@pytest.mark.parametrize(
    ("kind", "source", "record", "what"),
    [
        ("MethodInputs", f"{__name__}.Scaled.damp", {"record_idx": 1, "data_idx": 0}, lambda f, net: f / 4),
        ("MethodOutputs", f"{__name__}.Scaled.damp", {"record_idx": 1}, lambda f, net: f / 8),
        ("FunctionInputs", f"{__name__}.soften", {"data_idx": 0}, lambda f, net: net.head(f / 8)),
        ("ModuleInputs", "head", {"data_idx": 0}, lambda f, net: f / 8),
    ],
)
def test_records_of_calls_are_chosen_by_index(batch, kind, source, record, what):
    recorder = {"it": {"type": kind, "source": source}}
    sides = [{"recorder": "it", "from_student": student, **record} for student in (True, False)]
    algo = fastslim.AutoSlim(
        architecture=Scaled(),
        distiller={
            "type": "ConfigurableDistiller",
            "student_recorders": recorder,
            "teacher_recorders": recorder,
            "distill_losses": {"loss_at": {"type": "ATLoss"}},
            "loss_forward_mappings": {"loss_at": {"s_feature": sides[0], "t_feature": sides[1]}},
        },
        example_inputs=torch.zeros(2, 3, 8, 8),
        divisor=4,
    ).double()
    plain, maps = copy.deepcopy(algo.train()), []
    for widths in (plain.mutator.max_choices, plain.mutator.min_choices):
        plain.set_subnet(widths)
        net = plain.architecture
        feature = what(F.relu(net.bn(net.conv(batch[0]))).mean((2, 3)), net)
        maps.append(F.normalize(feature.square().mean(1, keepdim=True)))
    losses = step(algo, batch)
    torch.testing.assert_close(losses["min_subnet.loss_at"], (maps[1] - maps[0]).square().mean().detach())
    assert all(not r.data_buffer for r in algo.distiller._recorders())


def test_an_entry_without_loss_in_its_name_is_reported_and_not_trained(batch):
    record = {"recorder": "it"}
    mapping = {"ours": record | {"from_student": True}, "theirs": record | {"from_student": False}}
    with pytest.warns(UserWarning, match="call it 'loss_distance'"):
        algo = algorithm(
            **kl_between("head")
            | {
                "distill_losses": {"loss_own": Difference(), "distance": Difference()},
                "loss_forward_mappings": {"loss_own": mapping, "distance": mapping},
            }
        )
    alone = algorithm(
        **kl_between("head")
        | {"distill_losses": {"loss_own": Difference()}, "loss_forward_mappings": {"loss_own": mapping}}
    )
    losses = step(algo, batch)
    assert torch.equal(losses["min_subnet.distance"], losses["min_subnet.loss_own"])
    step(alone, batch)
    torch.testing.assert_close(algo.architecture.conv.weight.grad, alone.architecture.conv.weight.grad)


def test_self_distiller_trains_a_sandwich(batch):
    losses = [{"type": "KLDivergence", "name": "loss_kd", "tau": 2.0}]
    component = {"student_module": "head", "teacher_module": "head", "losses": losses}
    algo = algorithm(type="SelfDistiller", components=[component])
    truth = expected_kl(copy.deepcopy(algo), batch[0], "head")
    losses = step(algo, batch)
    torch.testing.assert_close(losses["min_subnet.loss_kd.0"], truth)
    assert set(losses) == {
        "max_subnet.loss",
        *(f"{name}.loss_kd.0" for name in ("min_subnet", "random_subnet_0", "random_subnet_1")),
    }
    same = algorithm(**kl_between("head"))
    step(same, batch)
    assert torch.equal(algo.architecture.conv.weight.grad, same.architecture.conv.weight.grad)


class Overflowing(nn.Module):
    def forward(self, ours: Tensor, theirs: Tensor) -> Tensor:
        return (ours - theirs).sum() / 0


def test_a_step_that_fails_leaves_no_record(batch):
    algo = algorithm(**kl_between("head") | {"distill_losses": {"loss": Overflowing()}})
    before = {name: value.clone() for name, value in algo.state_dict().items()}
    with pytest.raises(fastslim.FastslimError, match="in the min_subnet pass"):
        step(algo, batch)
    assert all(not r.data_buffer and not r.recording for r in algo.distiller._recorders())
    assert all(torch.equal(value, before[name]) for name, value in algo.state_dict().items())
