"""What AutoSlim refuses: bad input is named, with the pass, and changes nothing."""

from __future__ import annotations

import copy
import warnings

import plain_loop
import pytest
import torch
import torch.nn.functional as F
from autoslim_cases import batch, make, state
from torch import nn

import fastslim
from fastslim import errors

BAD_BATCHES = {
    "nan": (lambda x, y: (x.index_fill(0, torch.tensor([2]), float("nan")), y), ValueError, r"samples \[2\].*NaN"),
    "integer": (lambda x, y: ((x * 10).to(torch.uint8), y), TypeError, r"images.float\(\) / 255"),
    "one form too many": (lambda x, y: (x, y, y), TypeError, r"a batch should be \(inputs, targets\)"),
    "no targets": (lambda x, y: dict(inputs=x), ValueError, "max_subnet pass: the batch has no targets"),
    "label": (lambda x, y: (x, y + 10), ValueError, "max_subnet pass: .*class"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "kind", "message"), BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_bad_batches_are_named_and_change_nothing(spoil, kind, message) -> None:
    algo = make()
    optimizer = torch.optim.SGD(algo.parameters(), lr=0.1, momentum=0.9)
    algo.train_step(batch(), optimizer)
    before, momentum = state(algo), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(kind, match=message) as caught:
        algo.train_step(spoil(*batch()), optimizer)
    assert isinstance(caught.value, errors.FastslimError)
    for key, value in state(algo).items():
        assert torch.equal(value, before[key]), key
    assert str(optimizer.state_dict()) == str(momentum)
    assert torch.isfinite(algo.train_step(batch(), optimizer)["max_subnet.loss"])


@pytest.mark.parametrize(("name", "channel"), [("max_subnet", 31), ("min_subnet", 0)])
def test_non_finite_loss_names_the_pass_and_changes_nothing(name, channel) -> None:
    algo = make()
    optimizer = torch.optim.SGD(algo.parameters(), lr=0.1)
    if name == "max_subnet":
        algo.architecture.fc.weight.data[:, channel] = float("inf")
    else:  # full width is sound; a hook spoils the narrow pass only
        algo.architecture.mix.register_forward_hook(lambda m, i, y: y * float("nan") if y.shape[1] < 32 else y)
    before = state(algo)
    with pytest.raises(errors.FastslimRuntimeError, match=f"in the {name} pass: the loss is"):
        algo.train_step(batch(), optimizer)
    for key, value in state(algo).items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None for p in algo.parameters())


def test_batch_of_one_in_training_names_the_pass_and_the_fix() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    algo = make(net=net)
    before = state(algo)
    images, labels = batch(1)
    with pytest.raises(errors.FastslimValueError, match="max_subnet pass.*more than 1 value per channel"):
        algo.train_step((images, labels), torch.optim.SGD(algo.parameters(), lr=0.1))
    for key, value in state(algo).items():
        assert torch.equal(value, before[key]), key


def test_untraceable_model_names_the_line() -> None:
    class Branchy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            if x.sum() > 0:
                x = -x
            return self.conv(x).mean((2, 3))

    with pytest.raises(errors.FastslimRuntimeError, match=r"bad_input\.py"):
        make(net=Branchy())


def test_impossible_losses_and_optimizers_are_named() -> None:
    with pytest.raises(errors.FastslimValueError, match=r"none of \['ce'\] has 'loss' in its name"):
        make(loss=lambda out, y: {"ce": F.cross_entropy(out, y)}).accumulate(batch())
    algo = make()
    with pytest.raises(errors.FastslimTypeError, match="LBFGS"):
        algo.train_step(batch(), torch.optim.LBFGS(algo.parameters()))


def test_training_in_evaluation_mode_warns_once() -> None:
    algo = make().eval()
    with pytest.warns(UserWarning, match="algo.train"):
        algo.accumulate(batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        algo.accumulate(batch())


@pytest.mark.parametrize(("argument", "value"), [("mutator", 3), ("distiller", "kd"), ("architecture", "resnet18")])
def test_wrong_types_are_named(argument, value) -> None:
    options = {"architecture": plain_loop.ConcatNet(), "example_inputs": torch.randn(1, 3, 12, 12), argument: value}
    with pytest.raises(TypeError, match=f"{argument} should be a.*but got <class '{type(value).__name__}'>"):
        fastslim.AutoSlim(**options)
