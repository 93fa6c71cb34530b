"""BaseAlgorithm is an architecture with a preprocessor, called in modes, by MMRazor's names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastslim import errors
from fastslim.algorithms import BaseAlgorithm
from fastslim.algorithms.parts import build_part
from fastslim.distillers import ModuleOutputsRecorder
from fastslim.mutators import OneShotChannelMutator


class Toy(nn.Module):
    """A model with modes, whose activation overwrites its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.ReLU(inplace=True)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor") -> Any:
        out = self.relu(self.bn(self.conv(inputs)))
        return {"loss": out + 1} if mode == "loss" else out + (2 if mode == "predict" else 0)


def test_modes_have_names() -> None:
    algo, inputs = BaseAlgorithm(Toy()), torch.randn(2, 3, 4, 4)
    for name, mode in ((algo.loss, "loss"), (algo._predict, "predict"), (algo._forward, "tensor")):
        torch.testing.assert_close(name(inputs), algo(inputs, mode=mode))


@pytest.mark.parametrize("architecture", [Toy(), nn.Conv2d(3, 2, 1)])
def test_another_mode_is_refused_whatever_the_architecture(architecture: nn.Module) -> None:
    for kind in (RuntimeError, errors.FastslimValueError):
        with pytest.raises(kind, match='Invalid mode "A"'):
            BaseAlgorithm(architecture)(torch.randn(2, 3, 4, 4), mode="A")


def test_records_are_not_overwritten() -> None:
    toy, inputs = Toy(), torch.randn(2, 3, 4, 4)
    algo = BaseAlgorithm(toy)
    assert toy.relu.inplace is False
    recorder = ModuleOutputsRecorder("bn")
    recorder.initialize(toy)
    with recorder:
        algo(inputs)
    assert bool((recorder.get_record_data() < 0).any())
    assert BaseAlgorithm(Toy(), module_inplace=True).architecture.relu.inplace is True


def test_a_part_of_the_wrong_kind_is_a_type_error_and_for_mmrazor_an_attribute_error() -> None:
    for kind in (TypeError, AttributeError, errors.FastslimTypeError):
        with pytest.raises(kind, match="mutator should be a `dict` or `OneShotChannelMutator` instance, but got"):
            build_part("mutator", object(), OneShotChannelMutator)
