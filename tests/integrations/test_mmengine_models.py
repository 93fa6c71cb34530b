"""AutoSlim and SlimmableNetwork are models of mmengine in every respect that a Runner asks for."""

from __future__ import annotations

import copy
import random
from typing import Any

import mmengine.registry as roots
import pytest
import torch
import torch.nn.functional as F
from mmengine.model import BaseDataPreprocessor, BaseModel, BaseModule
from mmengine.optim import build_optim_wrapper
from mmengine_toys import DISTILLER, MUTATOR, ModeToy, PlainToy, batch, make
from torch import Tensor, nn

import fastslim
import fastslim.registry
from fastslim import algorithms, errors
from fastslim.integrations.mmengine import AutoSlim, BaseAlgorithm, SlimmableNetwork

LISTED = dict(
    type="SlimmableChannelMutator",
    channel_unit_cfg=dict(
        type="SlimmableChannelUnit",
        default_args=dict(candidate_choices=[0.25, 0.5, 1.0], choice_mode="ratio", divisor=2),
    ),
    parse_cfg=dict(type="ChannelAnalyzer", demo_input=(1, 1, 8, 8)),
)


def slimmable(**options: Any) -> SlimmableNetwork:
    torch.manual_seed(0)
    return SlimmableNetwork(ModeToy(), copy.deepcopy(LISTED), **options)


@pytest.mark.parametrize("architecture", [PlainToy, ModeToy])
def test_they_are_both_libraries_models(architecture: type[nn.Module]) -> None:
    algo, _ = make(architecture, torch.float32)
    assert isinstance(algo, fastslim.AutoSlim) and isinstance(algo, BaseModel)
    assert isinstance(slimmable(), algorithms.SlimmableNetwork) and isinstance(slimmable(), BaseModule)
    assert isinstance(algo.data_preprocessor, BaseDataPreprocessor)


def test_the_architectures_preprocessor_is_used_unless_another_is_given() -> None:
    own = BaseDataPreprocessor()
    algo = AutoSlim(architecture=ModeToy(data_preprocessor=own), mutator=copy.deepcopy(MUTATOR))
    assert algo.data_preprocessor is own
    other = BaseDataPreprocessor(non_blocking=True)
    algo = AutoSlim(architecture=ModeToy(), mutator=copy.deepcopy(MUTATOR), data_preprocessor=other)
    assert algo.data_preprocessor is other


def test_a_function_may_preprocess() -> None:
    calls = []

    def scaled(data: dict[str, Tensor], training: bool) -> dict[str, Tensor]:
        calls.append(training)
        return {**data, "inputs": data["inputs"] / 2}

    algo, _ = make(data_preprocessor=scaled)
    algo.val_step(batch())
    algo.train_step(batch(), torch.optim.SGD(algo.parameters(), 0.1))
    assert calls == [False, True]


def test_the_preprocessor_follows_the_models_device() -> None:
    algo, _ = make(ModeToy, torch.float32)
    algo.to("meta")
    assert algo.data_preprocessor.device.type == "meta"
    assert algo.data_preprocessor({"inputs": torch.zeros(1)})["inputs"].device.type == "meta"


@pytest.mark.filterwarnings("ignore:evaluating a subnet with running statistics")
def test_predictions_are_what_an_evaluator_takes() -> None:
    data = batch()
    for architecture in (PlainToy, ModeToy):
        algo, plain = make(architecture)
        algo.eval()
        plain.eval()
        output, targets = algo.val_step(data)
        torch.testing.assert_close(output, plain(data["inputs"]))
        assert torch.equal(targets, data["data_samples"])
        assert torch.equal(algo.test_step(data)[0], output)


def test_listed_samples_of_mmengines_default_collate_function_are_stacked() -> None:
    whole = batch()
    listed = {"inputs": list(whole["inputs"]), "data_samples": whole["data_samples"].tolist()}
    pair = [list(whole["inputs"]), list(whole["data_samples"])]
    for architecture in (PlainToy, ModeToy):
        losses = []
        for data in (whole, listed, pair):
            algo, _ = make(architecture, distiller=copy.deepcopy(DISTILLER))
            losses.append(algo.train_step(data, torch.optim.SGD(algo.parameters(), 0.1)))
        assert losses[0] == losses[1] == losses[2]


def test_losses_are_parsed_as_mmengine_does() -> None:
    algo, _ = make(ModeToy)
    raw = {
        "loss_cls": torch.tensor([1.0, 3.0]),
        "loss_box": [torch.tensor(1.0), torch.tensor(2.0)],
        "acc": torch.ones(2),
    }
    total, values = algo.parse_losses(raw)
    expected, expected_values = BaseModel.parse_losses(algo, raw)
    assert total == expected == 5.0
    assert values == expected_values
    assert next(iter(values)) == "loss"


def test_weights_are_initialised_by_the_architectures_own_config() -> None:
    config = [dict(type="Constant", layer="Conv2d", val=0.25), dict(type="Constant", layer="Linear", val=2.0, bias=3.0)]
    algo = AutoSlim(architecture=ModeToy(init_cfg=config), mutator=copy.deepcopy(MUTATOR))
    assert not bool((algo.architecture.conv1.weight == 0.25).all())
    algo.init_weights()
    assert bool((algo.architecture.conv1.weight == 0.25).all())
    assert bool((algo.architecture.fc.bias == 3.0).all())


def test_weights_are_initialised_by_the_algorithms_config() -> None:
    config = dict(type="Constant", layer="Conv2d", val=0.5)
    algo = AutoSlim(architecture=PlainToy(), mutator=copy.deepcopy(MUTATOR), init_cfg=config)
    algo.init_weights()
    assert bool((algo.architecture.conv2.weight == 0.5).all())


def test_without_a_config_the_architectures_weights_are_kept() -> None:
    algo, plain = make(ModeToy)
    algo.init_weights()
    for key, value in plain.state_dict().items():
        assert torch.equal(algo.architecture.state_dict()[key], value)


def test_the_state_holds_the_random_widths() -> None:
    algo, _ = make(ModeToy)
    algo.sample_subnet()
    state = copy.deepcopy(algo.state_dict())
    assert {key.split(".")[0] for key in state} == {"architecture", "_extra_state"}
    expected = [algo.sample_subnet() for _ in range(5)]
    other, _ = make(ModeToy)
    assert [other.sample_subnet() for _ in range(5)] != expected
    other.load_state_dict(state)
    assert [other.sample_subnet() for _ in range(5)] == expected
    with pytest.raises(errors.FastslimValueError, match="no state of random widths"):
        other.set_extra_state(torch.zeros(3))


def test_the_runs_seed_is_the_random_widths_seed_unless_the_mutator_has_its_own() -> None:
    def drawn(run: int, **mutator: Any) -> list[dict[str, int]]:
        random.seed(run)  # as a Runner's `randomness` does
        algo = AutoSlim(architecture=ModeToy(), mutator={**copy.deepcopy(MUTATOR), **mutator})
        return [algo.sample_subnet() for _ in range(5)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(0, seed=3) == drawn(1, seed=3)


def test_a_copy_draws_widths_of_its_own() -> None:
    algo, _ = make(ModeToy)
    twin = copy.deepcopy(algo)
    assert algo.sample_subnet() == twin.sample_subnet()
    algo.sample_subnet()
    assert [algo.sample_subnet() for _ in range(5)] != [twin.sample_subnet() for _ in range(5)]


def test_an_algorithm_of_ones_own_is_a_model_of_mmengine() -> None:
    class Halving(BaseAlgorithm):
        """Trains half the width."""

        def __init__(self, architecture: Any, mutator: Any) -> None:
            super().__init__(architecture)
            self.mutator = fastslim.registry.MODELS.build(mutator)
            self.mutator.prepare_from_supernet(self.architecture)

        def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Any]:
            self.mutator.set_choices(self.mutator.uniform_choices(0.5))
            return super().train_step(data, optim_wrapper)

    fastslim.registry.MODELS.register_module("Halving", module=Halving)
    try:
        algo = roots.MODELS.build(
            dict(type="fastslim.Halving", architecture=dict(type="ModeToy"), mutator={**MUTATOR, "seed": 1})
        )
    finally:
        del fastslim.registry.MODELS.module_dict["Halving"]
    assert isinstance(algo, BaseModel) and isinstance(algo, algorithms.BaseAlgorithm)
    wrapper = build_optim_wrapper(algo, dict(optimizer=dict(type="SGD", lr=0.1)))
    before = algo.architecture.conv1.weight.clone()
    losses = algo.train_step(batch(torch.float32), optim_wrapper=wrapper)
    assert set(losses) == {"loss"}
    changed = (algo.architecture.conv1.weight != before).flatten(1).any(1)
    assert changed.tolist() == [True] * 4 + [False] * 4
    state = copy.deepcopy(algo.state_dict())
    expected = [algo.mutator.sample_choices() for _ in range(5)]
    algo.load_state_dict(state)
    assert [algo.mutator.sample_choices() for _ in range(5)] == expected


def test_the_base_takes_what_mmrazors_takes() -> None:
    own = BaseDataPreprocessor()
    assert type(BaseAlgorithm(ModeToy()).data_preprocessor) is BaseDataPreprocessor
    assert BaseAlgorithm(ModeToy(data_preprocessor=own)).data_preprocessor is own
    assert BaseAlgorithm(PlainToy(), data_preprocessor=own).data_preprocessor is own
    assert isinstance(BaseAlgorithm(dict(type="ModeToy")).architecture, ModeToy)
    assert type(roots.MODELS.build(dict(type="mmrazor.BaseAlgorithm", architecture=ModeToy()))) is BaseAlgorithm
    with pytest.raises(TypeError, match="architecture should be"):
        BaseAlgorithm(architecture=[ModeToy()])
    state = BaseAlgorithm(ModeToy()).state_dict()
    BaseAlgorithm(ModeToy()).load_state_dict(state)
    data = batch(torch.float32)
    algo = BaseAlgorithm(ModeToy())
    torch.testing.assert_close(algo.loss(*data.values()), algo(*data.values(), mode="loss"))


def test_a_loss_of_ones_own_serves_a_plain_network() -> None:
    algo, plain = make(loss=nn.CrossEntropyLoss(label_smoothing=0.1))
    data = batch()
    expected = F.cross_entropy(plain(data["inputs"]), data["data_samples"], label_smoothing=0.1)
    losses = algo.train_step(data, torch.optim.SGD(algo.parameters(), 0.1))
    torch.testing.assert_close(losses["max_subnet.loss"], expected.detach())


def test_a_slimmable_network_trains_every_listed_subnet() -> None:
    algo = slimmable()
    wrapper = build_optim_wrapper(algo, dict(optimizer=dict(type="SGD", lr=0.1), accumulative_counts=3))
    before = copy.deepcopy(algo.architecture.state_dict())
    losses = algo.train_step(batch(torch.float32), wrapper)
    assert sorted(losses) == ["subnet_0.loss", "subnet_1.loss", "subnet_2.loss"]
    assert wrapper._inner_count == 3
    assert not torch.equal(before["conv1.weight"], algo.architecture.conv1.weight)


@pytest.mark.parametrize("index", [-1, 0])
def test_statistics_of_its_own_need_no_calibration(index: int, recwarn: pytest.WarningsRecorder) -> None:
    algo = slimmable(deploy_index=index).eval()
    algo.val_step(batch(torch.float32))
    assert not [str(warning.message) for warning in recwarn if "all widths share" in str(warning.message)]


def test_a_deployed_slimmable_network_is_one_of_them() -> None:
    algo = slimmable(deploy_index=0)
    assert algo.is_deployed
    assert algo.architecture.conv1.weight.shape[0] == 2
    wrapper = build_optim_wrapper(algo, dict(optimizer=dict(type="SGD", lr=0.1)))
    losses = algo.train_step(batch(torch.float32), wrapper)
    assert list(losses) == ["loss"]


def test_a_slimmable_network_is_built_by_its_name() -> None:
    config = dict(type="mmrazor.SlimmableNetwork", architecture=dict(type="ModeToy"), mutator=LISTED)
    assert type(roots.MODELS.build(config)) is SlimmableNetwork
