"""Search and validation loops, with a runner that is only a stand-in: files, resuming, refusals."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import mmengine.registry as roots
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine_toys import MUTATOR, PlainToy, make
from torch.utils.data import DataLoader, Dataset

import fastslim
from fastslim import errors
from fastslim.integrations.mmengine import (
    Accuracy,
    AutoSlim,
    AutoSlimGreedySearchLoop,
    CalibrateBNMixin,
    EvolutionSearchLoop,
    ResourceEstimator,
    SubnetValLoop,
)
from fastslim.integrations.mmengine.search_state import load_state


class Images(Dataset):
    """Two batches' worth of noise."""

    metainfo: dict[str, Any] = {}

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"inputs": torch.randn(1, 8, 8, generator=generator), "data_samples": index % 10}


class Stopped(Exception):
    """Stands for a kill."""


ASKED = ["model", "rank", "work_dir", "distributed", "logger", "call_hook", "visualizer"]


def runner(folder: Path, *more: str) -> MagicMock:
    """What the loops ask of a runner."""
    stand_in = MagicMock(spec=[*ASKED, *more])
    stand_in.model = make(PlainToy, torch.float32)[0]
    stand_in.rank, stand_in.work_dir, stand_in.distributed = 0, str(folder), False
    return stand_in


def greedy(folder: Path, **options: Any) -> AutoSlimGreedySearchLoop:
    settings: dict[str, Any] = dict(
        type="fastslim.AutoSlimGreedySearchLoop",
        runner=runner(folder),
        dataloader=DataLoader(Images(), batch_size=6),
        evaluator=Evaluator(Accuracy()),
        target_flops=(0.02, 0.01),
    )
    return roots.LOOPS.build({**settings, **options})


def evolution(folder: Path, **options: Any) -> EvolutionSearchLoop:
    settings: dict[str, Any] = dict(
        type="mmrazor.EvolutionSearchLoop",
        runner=runner(folder),
        dataloader=DataLoader(Images(), batch_size=6),
        evaluator=Evaluator(Accuracy()),
        max_epochs=3,
        num_candidates=3,
        top_k=2,
        num_mutation=1,
        num_crossover=1,
        constraints_range=dict(flops=(0, 0.03)),
    )
    return roots.LOOPS.build({**settings, **options})


def test_the_loop_runs_with_any_evaluator(tmp_path: Path) -> None:
    """Scores of an evaluator that measures nothing are all alike, and the first unit by name is narrowed."""
    settings = Config(dict(type="mmrazor.AutoSlimGreedySearchLoop", target_flops=(0.02,)))
    settings.runner, settings.dataloader = runner(tmp_path), DataLoader(Images(), batch_size=6)
    settings.evaluator = MagicMock()
    loop = roots.LOOPS.build(settings)
    assert isinstance(loop, AutoSlimGreedySearchLoop)
    loop.run()
    assert len(loop.searched_subnet) == 1
    assert loop.current_subnet == loop.searched_subnet[0]
    assert loop.current_flops == loop.searched_subnet_flops[0] <= 0.02


def test_costs_are_millions_of_multiply_adds(tmp_path: Path) -> None:
    loop = greedy(tmp_path)
    # 8x8 pixels, 1 -> 8 channels; 4x4 pixels, 8 -> 16; 2x2 pixels of 16 channels -> 10 classes.
    assert loop.current_flops == (64 * 8 * 9 + 16 * 8 * 16 * 9 + 64 * 10) / 1e6
    assert loop.costs(loop.model.mutator.max_choices)["params"] == (72 + 16 + 1152 + 32 + 650) / 1e6


def test_each_target_has_a_file_that_set_subnet_takes(tmp_path: Path) -> None:
    loop = greedy(tmp_path)
    metrics = loop.run()
    assert len(metrics) == 2
    saved = [
        yaml.safe_load((tmp_path / f"FLOPS_{flops:.2f}M.yaml").read_text()) for flops in loop.searched_subnet_flops
    ]
    assert saved == loop.searched_subnet
    loop.model.set_subnet(saved[1])
    hooks = [call.args[0] for call in loop.runner.call_hook.call_args_list]
    assert hooks == ["before_test", "before_test_epoch", "after_test_epoch", "after_test"]


def test_the_supernet_is_afterwards_as_it_was(tmp_path: Path) -> None:
    loop = greedy(tmp_path)
    loop.model.train()
    before = copy.deepcopy(loop.model.state_dict())
    modes = {name: module.training for name, module in loop.model.named_modules()}
    loop.run()
    assert all(torch.equal(value, before[key]) for key, value in loop.model.state_dict().items())
    assert modes == {name: module.training for name, module in loop.model.named_modules()}
    assert loop.model.mutator.current_choices == loop.model.mutator.max_choices


@pytest.mark.parametrize("calibrate", [-1, 12])
def test_the_scores_are_those_of_each_subnets_own_statistics(tmp_path: Path, calibrate: int) -> None:
    loop = greedy(tmp_path, calibrate_sample_num=calibrate, runner=with_training_data(tmp_path))
    subnet = loop.model.mutator.min_choices
    with loop.comparing_subnets():
        score = loop.score(subnet)
    loop.model.eval()
    images = torch.stack([Images()[index]["inputs"] for index in range(12)])
    labels = torch.tensor([Images()[index]["data_samples"] for index in range(12)])
    if calibrate > 0:
        fastslim.calibrate_batch_norm(loop.model, loop.runner.train_loop.dataloader, [subnet])
        loop.model.set_subnet(subnet)
        output = loop.model(images)
    else:
        loop.model.set_subnet(subnet)
        loop.model.train()
        output = torch.cat([loop.model(half) for half in images.split(6)])
    assert score == pytest.approx(100 * float((output.argmax(1) == labels).float().mean()))


def with_training_data(folder: Path) -> MagicMock:
    stand_in = runner(folder, "train_loop")
    stand_in.train_loop.dataloader = DataLoader(Images(), batch_size=6)
    return stand_in


def stopped_after(loop: Any, evaluations: int) -> None:
    """Kills the search after some evaluations."""
    score, count = loop.search.score, iter(range(evaluations))

    def counted(choices: Any) -> float:
        if next(count, None) is None:
            raise Stopped
        return score(choices)

    loop.search.score = counted
    with pytest.raises(Stopped):
        loop.run()


def test_a_stopped_greedy_search_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole, first = tmp_path / "whole", tmp_path / "first"
    whole.mkdir()
    first.mkdir()
    expected = greedy(whole)
    expected.run()
    stopped_after(greedy(first), 5)
    second = greedy(first, resume_from=str(first / "greedy_search.json"))
    second.run()
    assert second.searched_subnet == expected.searched_subnet
    assert second.search.step == expected.search.step > 2
    states = [json.loads((folder / "greedy_search.json").read_text()) for folder in (first, whole)]
    assert states[0] == states[1]


def test_a_stopped_evolution_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole, first = tmp_path / "whole", tmp_path / "first"
    whole.mkdir()
    first.mkdir()
    expected = evolution(whole)
    expected.run()
    stopped_after(evolution(first), 4)
    second = evolution(first, resume_from=str(first / "search_epoch_1.json"))
    second.run()
    assert second.search.found == expected.search.found
    assert second.top_k_candidates == expected.top_k_candidates
    assert (whole / "best_fix_subnet.yaml").read_text() == (first / "best_fix_subnet.yaml").read_text()


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "harmed",)

    (tmp_path / "latest.pkl").write_bytes(pickle.dumps(Harmful()))
    for make_loop in (greedy, evolution):
        with pytest.raises(errors.FastslimFileError, match="no pickle is opened"):
            make_loop(tmp_path, resume_from=str(tmp_path / "latest.pkl")).run()
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(("text", "message"), [("{", "is no JSON"), ("{}", "not the state of a greedy search")])
def test_another_file_is_no_state(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(errors.FastslimFileError, match=message):
        load_state(tmp_path / "other.json", "greedy")
    with pytest.raises(errors.FastslimFileError, match="cannot be read"):
        load_state(tmp_path / "absent.json", "greedy")


@pytest.mark.parametrize(
    ("make_loop", "options", "message"),
    [
        (greedy, dict(score_key="accuracy/top"), "score_key='accuracy/top' is none .*did you mean 'accuracy/top1'"),
        (greedy, dict(target_flops=(1e-4,)), "below the smallest subnet"),
        (greedy, dict(estimator_cfg=dict(input_shape=(1, 3, 224, 224))), "has traced inputs of"),
        (greedy, dict(estimator_cfg=dict(input_shap=(1, 1, 8, 8))), "did you mean 'input_shape'"),
        (greedy, dict(runner=MagicMock(model=torch.nn.Linear(1, 1))), "needs a supernet"),
        (evolution, dict(constraints_range=dict(flop=1)), "no key 'flop': did you mean 'flops'"),
        (evolution, dict(predictor_cfg=dict(type="MetricPredictor")), "predictor_cfg is not supported"),
        (evolution, dict(num_mutation=3), "more than the population"),
    ],
)
def test_what_cannot_work_says_so(make_loop: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(errors.FastslimError, match=message):
        make_loop(tmp_path, **options).run()


def test_an_estimator_of_ones_own_sees_every_subnet_as_a_network(tmp_path: Path) -> None:
    class Sum:
        def estimate(self, model: torch.nn.Module) -> dict[str, float]:
            return {"flops": float(sum(p.numel() for p in model.parameters())), "params": 0.0}

    loop = greedy(tmp_path, estimator_cfg=dict(type=Sum), target_flops=800)
    assert loop.current_flops == 72 + 16 + 1152 + 32 + 650
    loop.run()
    assert loop.current_flops <= 800


def test_the_estimator_takes_mmrazors_options(tmp_path: Path) -> None:
    model = make(PlainToy, torch.float32)[0]
    size = dict(input_shape=(1, 1, 8, 8))
    config = dict(type="mmrazor.ResourceEstimator", flops_params_cfg=size, units=dict(flops="K"))
    estimator = roots.TASK_UTILS.build(config)
    assert greedy(tmp_path, estimator_cfg=dict(type="ResourceEstimator", **size)).current_flops < 1
    assert isinstance(estimator, ResourceEstimator)
    assert estimator.estimate(model)["flops"] == model.subnet_cost(model.mutator.max_choices).multiply_adds / 1e3
    with pytest.raises(errors.FastslimValueError, match="leave out as_strings"):
        ResourceEstimator(as_strings=True)


def test_an_evolution_within_no_constraint_takes_the_best_of_all(tmp_path: Path) -> None:
    loop = evolution(tmp_path, constraints_range=None)
    loop.run()
    assert loop.top_k_candidates[0].score == max(record.score for record in loop.search._evaluated.values())


def test_statistics_are_calibrated_for_the_present_subnet(tmp_path: Path) -> None:
    class Loop(CalibrateBNMixin):
        pass

    loop = Loop()
    loop.runner = runner(tmp_path)
    model = loop.runner.model
    model.set_min_subnet()
    loop.calibrate_bn_statistics(DataLoader(Images(), batch_size=6), 6)
    images = torch.stack([Images()[index]["inputs"] for index in range(6)])
    features = model.architecture.conv1(images)
    mean, _ = model.architecture.norm1.calibrated
    torch.testing.assert_close(mean, features.mean((0, 2, 3)))


def test_validation_leaves_the_random_widths_of_training_alone(tmp_path: Path) -> None:
    stand_in = with_training_data(tmp_path)
    loop = SubnetValLoop(stand_in, DataLoader(Images(), batch_size=6), Evaluator(Accuracy()), calibrate_sample_num=12)
    state = stand_in.model.get_extra_state()
    first, second = loop.run(), loop.run()
    assert first == second
    assert torch.equal(stand_in.model.get_extra_state(), state)
    assert {name.split(".")[0] for name in first} == {"max_subnet", "min_subnet", "random_subnet_0", "random_subnet_1"}


def test_a_config_mutator_is_made_anew_for_every_model() -> None:
    before = copy.deepcopy(MUTATOR)
    AutoSlim(architecture=PlainToy(), mutator=MUTATOR)
    assert before == MUTATOR
