"""Architectures with modes, as OpenMMLab's models are: forward(inputs, data_samples, mode)."""

from __future__ import annotations

import copy
import pickle

import plain_loop
import pytest
import torch
import torch.nn.functional as F
from test_exactness import assert_equal_to_rounding, gradients, statistics, subnets_of_next_step
from test_step_options import distiller
from torch import nn

import fastslim


class Classifier(nn.Module):
    """A network with a head that makes its own losses, one of them a list and one no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = plain_loop.ConcatNet()

    def forward(self, inputs, data_samples=None, mode="tensor"):
        logits = self.backbone(inputs)
        if mode == "tensor":
            return logits
        if mode == "loss":
            per_sample = F.cross_entropy(logits, data_samples, reduction="none")
            return {"loss_cls": [per_sample, 0 * per_sample], "accuracy": (logits.argmax(1) == data_samples).double()}
        return [{"pred": int(row.argmax())} for row in logits]


class Preprocessor(nn.Module):
    """Divides by 2; remembers what it was told, and where it was moved."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.moves = [], []

    def to(self, device):
        self.moves.append(torch.device(device))
        return super().to(device)

    def forward(self, data, training=False):
        self.calls.append(training)
        return {"inputs": data["inputs"] / 2, "data_samples": data["data_samples"]}


def make(**options):
    torch.manual_seed(0)
    net = Classifier().double()
    images, labels = torch.randn(6, 3, 12, 12, dtype=torch.float64), torch.randint(0, 10, (6,))
    plain = copy.deepcopy(net.backbone)
    options = {"distiller": distiller("backbone.fc"), "example_inputs": images[:1], "divisor": 4, "seed": 1, **options}
    return fastslim.AutoSlim(architecture=net, **options), plain, images, labels


@pytest.mark.parametrize("student_loss", ["kd", "ce+kd"])
def test_a_step_equals_the_plain_loop(student_loss) -> None:
    algo, plain, images, labels = make(student_loss=student_loss, num_samples=1)
    net = plain_loop.Net(plain)
    widths = [{k.removeprefix("backbone."): v for k, v in w.items()} for w in subnets_of_next_step(algo)]
    losses = algo.accumulate({"inputs": images, "data_samples": labels})
    teacher = None
    for name, net.widths in zip(["max_subnet", "min_subnet", "random_subnet_0"], widths, strict=True):
        logits = plain_loop.concat_net(net, images)
        total, hard = 0.0, F.cross_entropy(logits, labels)
        if teacher is None or student_loss == "ce+kd":
            total = hard
            assert float(losses[f"{name}.loss_cls"]) == pytest.approx(hard.item(), abs=1e-12)
            accuracy = (logits.argmax(1) == labels).double().mean()
            assert float(losses[f"{name}.accuracy"]) == float(accuracy)  # reported, not trained
        if teacher is not None:
            soft = F.kl_div(F.log_softmax(logits, 1), F.softmax(teacher, 1), reduction="batchmean")
            assert float(losses[f"{name}.loss_kl"]) == pytest.approx(soft.item(), abs=1e-12)
            total = total + soft
        teacher = logits.detach() if teacher is None else teacher
        total.backward()
    assert_equal_to_rounding(gradients(algo.architecture.backbone), gradients(plain))
    assert_equal_to_rounding(statistics(algo.architecture.backbone), statistics(plain))


def test_modes_pass_through_the_algorithm() -> None:
    algo, _, images, labels = make(norm_training=True)
    algo.eval()
    assert algo(images).shape == algo(images, mode="tensor").shape == (6, 10)
    assert set(algo(images, labels, mode="loss")) == {"loss_cls", "accuracy"}
    assert algo.val_step((images, labels)) == algo.test_step({"inputs": images, "data_samples": labels})
    assert set(algo.val_step((images, labels))[0]) == {"pred"}


def test_without_a_distiller_the_module_that_makes_the_logits_is_recorded() -> None:
    algo, _, images, labels = make(distiller=None)
    named, *_ = make()
    before = copy.deepcopy(algo.state_dict())
    assert algo.distiller.recorded_modules == {"backbone.fc"}  # not the backbone, which returns the same
    data = {"inputs": images, "data_samples": labels}
    assert algo.accumulate(data) == named.accumulate(data)
    fresh, *_ = make(distiller=None)
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())


def test_looking_for_the_logits_leaves_no_hook_behind() -> None:
    algo, _, images, labels = make(distiller=None)
    assert not any(module._forward_hooks for module in algo.architecture.modules())
    algo.accumulate({"inputs": images, "data_samples": labels})
    copied = pickle.loads(pickle.dumps(algo))
    assert "min_subnet.loss_kl" in copied.accumulate({"inputs": images, "data_samples": labels})


def test_an_output_that_no_module_makes_needs_a_distiller() -> None:
    class Scaled(Classifier):
        def forward(self, inputs, data_samples=None, mode="tensor"):
            logits = 2 * self.backbone(inputs)
            return logits if mode == "tensor" else {"loss": F.cross_entropy(logits, data_samples)}

    with pytest.raises(ValueError, match="Scaled makes its losses itself, .* distiller=dict"):
        fastslim.AutoSlim(architecture=Scaled(), example_inputs=torch.randn(1, 3, 12, 12))


def test_a_network_without_modes_gets_them() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(6, 3, 12, 12), torch.randint(0, 10, (6,))
    algo = fastslim.AutoSlim(architecture=plain_loop.ConcatNet(), example_inputs=images[:1], norm_training=True).eval()
    logits = algo(images)
    assert torch.equal(algo(images, labels, mode="tensor"), logits)
    torch.testing.assert_close(algo(images, labels, mode="loss")["loss"], F.cross_entropy(logits, labels))
    output, targets = algo.val_step((images, labels))
    assert torch.equal(output, logits) and targets is labels
    with pytest.raises(ValueError, match="mode='los': did you mean 'loss'"):
        algo(images, labels, mode="los")


def test_a_preprocessor_runs_learns_its_device_and_is_the_architectures_by_default() -> None:
    own = Preprocessor()
    algo, _, images, labels = make(data_preprocessor=own, norm_training=True)
    data = {"inputs": images, "data_samples": labels}
    halved = copy.deepcopy(algo).accumulate(data)
    algo.data_preprocessor = None
    assert halved == algo.accumulate({"inputs": images / 2, "data_samples": labels})
    algo.data_preprocessor = own
    algo.eval().val_step(data)
    assert own.calls == [False]  # the copy's preprocessor was told True
    algo.float()
    assert own.moves == [torch.device("cpu")]
    net = Classifier()
    net.data_preprocessor = own
    assert fastslim.AutoSlim(architecture=net, example_inputs=images[:1].float()).data_preprocessor is own


def test_parse_losses_sums_what_is_called_a_loss() -> None:
    algo, *_ = make()
    losses = {"loss_a": torch.tensor([1.0, 3.0]), "acc": torch.tensor(9.0), "loss_b": [torch.tensor(1.0)] * 2}
    total, log = algo.parse_losses(losses)
    assert float(total) == 4.0
    assert {name: float(value) for name, value in log.items()} == {"loss": 4.0, "loss_a": 2.0, "acc": 9.0, "loss_b": 2}
    with pytest.raises(TypeError, match="'loss_c' is str: 'x'"):
        algo.parse_losses({"loss_c": "x"})
