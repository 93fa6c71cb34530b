"""Feature distillation between widths: connectors take each pass's narrow feature, and are trained with the network."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastslim


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


def algorithm(num_samples=2, **distiller):
    feature, logits = {"type": "ModuleOutputs", "source": "bn2"}, {"type": "ModuleOutputs", "source": "head"}
    config = {
        "type": "ConfigurableDistiller",
        "student_recorders": {"feature": feature, "logits": logits},
        "teacher_recorders": {"feature": feature, "logits": logits},
        "connectors": {
            "widen": {
                "type": "ConvModuleConnector",
                "in_channel": 16,
                "out_channel": 16,
                "norm_cfg": {"type": "BN"},
                "act_cfg": None,
            }
        },
        "distill_losses": {
            "loss_feature": {"type": "L2Loss", "normalize": False, "div_element": True, "loss_weight": 3.0},
            "loss_kl": {"type": "KLDivergence", "tau": 2.0},
        },
        "loss_forward_mappings": {
            "loss_feature": {
                "s_feature": {"recorder": "feature", "from_student": True, "connector": "widen"},
                "t_feature": {"recorder": "feature", "from_student": False},
            },
            "loss_kl": {
                "preds_S": {"recorder": "logits", "from_student": True},
                "preds_T": {"recorder": "logits", "from_student": False},
            },
        },
    }
    algo = fastslim.AutoSlim(
        architecture=Net(),
        distiller=config | distiller,
        example_inputs=torch.zeros(2, 3, 8, 8),
        divisor=4,
        num_samples=num_samples,
        seed=0,
    )
    return algo.double().train()


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 8, 8, generator=random, dtype=torch.float64), torch.randint(5, (6,), generator=random)


def narrow_forward(net, x, c1, c2):
    """The network at two widths, by torch's own functions."""
    x = F.conv2d(x, net.conv1.weight[:c1], padding=1)
    x = F.relu(F.batch_norm(x, None, None, net.bn1.weight[:c1], net.bn1.bias[:c1], training=True))
    x = F.conv2d(x, net.conv2.weight[:c2, :c1], padding=1)
    feature = F.batch_norm(x, None, None, net.bn2.weight[:c2], net.bn2.bias[:c2], training=True)
    return feature, F.linear(F.relu(feature).mean((2, 3)), net.head.weight[:, :c2], net.head.bias)


def plain_loop(net, connector, widths, images, labels):
    """Losses of all passes as a user would write them; the gradients go to the parameters."""
    losses = {}
    for index, (c1, c2) in enumerate(widths):
        feature, logits = narrow_forward(net, images, c1, c2)
        if index == 0:
            teacher = feature.detach(), logits.detach()
            losses["max_subnet.loss"] = F.cross_entropy(logits, labels)
            losses["max_subnet.loss"].backward()
            continue
        name = "min_subnet" if index == 1 else f"random_subnet_{index - 2}"
        widened = F.conv2d(feature, connector.conv.weight[:, :c2])
        widened = F.batch_norm(widened, None, None, connector.norm.weight, connector.norm.bias, training=True)
        losses[f"{name}.loss_feature"] = 3 * (widened - teacher[0]).square().mean()
        log_q, p = (logits / 2).log_softmax(1), (teacher[1] / 2).softmax(1)
        losses[f"{name}.loss_kl"] = 4 * F.kl_div(log_q, p, reduction="batchmean")
        (losses[f"{name}.loss_feature"] + losses[f"{name}.loss_kl"]).backward()
    return losses


def widths_of(algo, choices):
    algo.set_subnet(choices)
    widths = algo.architecture.conv1.active_out, algo.architecture.conv2.active_out
    algo.set_max_subnet()
    return widths


@pytest.mark.parametrize("num_samples", [0, 2])
def test_gradients_are_those_of_a_plain_loop(batch, num_samples):
    algo = algorithm(num_samples)
    plain = copy.deepcopy(algo)
    choices = [plain.mutator.max_choices, plain.mutator.min_choices]
    choices += [plain.sample_subnet() for _ in range(num_samples)]
    widths = [widths_of(plain, choice) for choice in choices]
    assert widths[0] == (8, 16) and widths[1][1] < 16
    truth = plain_loop(plain.architecture, plain.distiller.connectors["widen"].conv_module, widths, *batch)
    losses = algo.train_step(batch, torch.optim.SGD(algo.parameters(), 0.0))
    assert set(losses) == set(truth)
    for name, loss in truth.items():
        torch.testing.assert_close(losses[name], loss.detach(), rtol=1e-12, atol=1e-12)
    gradients = dict(algo.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-10, atol=1e-12, msg=name)
    connector = algo.distiller.connectors["widen"].conv_module
    assert int(connector.norm.num_batches_tracked) == 1 + num_samples


def test_connectors_are_trained_and_losses_decrease(batch):
    algo = algorithm()
    before = {name: p.detach().clone() for name, p in algo.distiller.named_parameters()}
    assert set(before) == {f"connectors.widen.conv_module.{name}" for name in ("conv.weight", "bn.weight", "bn.bias")}
    assert {f"distiller.{name}" for name in before} <= {name for name, _ in algo.named_parameters()}
    optimizer = torch.optim.SGD(algo.parameters(), 0.01, momentum=0.9)
    history = [algo.train_step(batch, optimizer) for _ in range(40)]
    assert history[-1]["max_subnet.loss"] < 0.8 * history[0]["max_subnet.loss"]
    assert history[-1]["min_subnet.loss_feature"] < 0.5 * history[0]["min_subnet.loss_feature"]
    for name, parameter in algo.distiller.named_parameters():
        assert not torch.equal(parameter, before[name])
    restored = algorithm()
    restored.load_state_dict(algo.state_dict())
    weight = "connectors.widen.conv_module.conv.weight"
    assert torch.equal(restored.distiller.get_parameter(weight), algo.distiller.get_parameter(weight))


def test_a_copy_right_after_a_step_goes_on_alike(batch):
    algo = algorithm()
    algo.train_step(batch, torch.optim.SGD(algo.parameters(), 0.1))
    for recorder in algo.distiller._recorders():
        assert recorder.data_buffer == []
    other = copy.deepcopy(algo)
    ours, others = (x.train_step(batch, torch.optim.SGD(x.parameters(), 0.1)) for x in (algo, other))
    assert ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)
    assert torch.equal(algo.architecture.conv2.weight, other.architecture.conv2.weight)


def test_a_list_of_connectors_runs_one_after_the_other(batch):
    pool = {"type": "TorchNNConnector", "module_name": "AvgPool2d", "module_args": {"kernel_size": 4}}
    conv = {"type": "ConvModuleConnector", "in_channel": 16, "out_channel": 16, "act_cfg": None}
    norm = {"type": "NormConnector", "in_channels": 16, "norm_cfg": {"type": "BN", "affine": False}}
    algo = algorithm(
        connectors={"widen": [pool, conv, norm], "pool": pool},
        loss_forward_mappings={
            "loss_feature": {
                "s_feature": {"recorder": "feature", "from_student": True, "connector": "widen"},
                "t_feature": {"recorder": "feature", "from_student": False, "connector": "pool"},
            },
            "loss_kl": {
                "preds_S": {"recorder": "logits", "from_student": True},
                "preds_T": {"recorder": "logits", "from_student": False},
            },
        },
    )
    assert isinstance(algo.distiller.connectors["widen"], nn.Sequential)
    losses = algo.train_step(batch, torch.optim.SGD(algo.parameters(), 0.1))
    assert losses["min_subnet.loss_feature"] > 0
    assert algo.distiller.connectors["widen"][1].conv_module.conv.weight.grad.abs().sum() > 0


def test_attention_needs_no_connector(batch):
    algo = algorithm(
        connectors=None,
        distill_losses={"loss_at": {"type": "ATLoss", "loss_weight": 100.0}, "loss": {"type": "AdaptiveLossSoft"}},
        loss_forward_mappings={
            "loss_at": {
                "s_feature": {"recorder": "feature", "from_student": True},
                "t_feature": {"recorder": "feature", "from_student": False},
            },
            "loss": {
                "preds_S": {"recorder": "logits", "from_student": True},
                "preds_T": {"recorder": "logits", "from_student": False},
            },
        },
    )
    optimizer = torch.optim.SGD(algo.parameters(), 0.05, momentum=0.9)
    history = [algo.train_step(batch, optimizer) for _ in range(40)]
    assert history[-1]["min_subnet.loss_at"] < 0.7 * history[0]["min_subnet.loss_at"]


def test_a_failed_pass_leaves_a_connectors_statistics_as_they_were() -> None:
    algo = algorithm(num_samples=1)
    before = copy.deepcopy(algo.state_dict())
    inner, calls = algo.losses_of_pass, iter(range(3))

    def failing(*arguments, **options):
        losses, output = inner(*arguments, **options)
        return ({name: value * float("nan") for name, value in losses.items()} if next(calls) == 2 else losses), output

    algo.losses_of_pass = failing
    images, labels = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randint(5, (6,))
    with pytest.raises(RuntimeError, match="in the random_subnet_0 pass"):
        algo.train_step((images, labels), torch.optim.SGD(algo.parameters(), 0.1))
    for name, value in algo.state_dict().items():
        assert torch.equal(value, before[name]), name
