"""The shipped configurations: each loads, says what the published recipe says, and builds its supernet."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

from fastslim.data import ImageData
from fastslim.engine.build import build_supernet
from fastslim.engine.config import SHIPPED, load_config

RECIPES = sorted(path.stem for path in SHIPPED.glob("imagenet_*.yaml"))
EMPTY: TensorDataset = TensorDataset(torch.zeros(0, 3, 64, 64), torch.zeros(0, dtype=torch.long))
IMAGENET = ImageData(EMPTY, EMPTY, EMPTY, num_classes=1000, image_shape=(3, 64, 64))
# Parameters of the networks at full supernet width: the published ones, and 1.5 times their channels.
MILLIONS = {"mobilenet_v1": 8.8, "mobilenet_v2": 6.9, "mnasnet": 8.8, "resnet50": 25.6}


def test_every_network_of_the_paper_has_a_recipe() -> None:
    assert [load_config(name).model for name in RECIPES] == ["mnasnet", "mobilenet_v1", "mobilenet_v2", "resnet50"]


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_is_the_published_one(name: str) -> None:
    config = load_config(name)
    assert config.batch_size * config.accumulate == 1024
    assert (config.lr, config.momentum, config.nesterov) == (0.5, 0.9, True)
    assert (config.weight_decay, config.norm_weight_decay) == (1e-4, 1e-4)
    assert config.epochs == 250 / 5
    assert config.width_mult == (1.0 if config.model == "resnet50" else 1.5)
    assert min(config.choices) == 2 / 12 and len(config.choices) == 11


@pytest.mark.parametrize("name", RECIPES)
def test_the_supernet_is_built_and_slims(name: str) -> None:
    config = load_config(name)
    algo = build_supernet(config, IMAGENET, torch.device("cpu"))
    full, smallest = (algo.subnet_cost(c) for c in (algo.mutator.max_choices, algo.mutator.min_choices))
    assert full.parameters / 1e6 == pytest.approx(MILLIONS[config.model], abs=0.1)
    assert smallest.multiply_adds < 0.07 * full.multiply_adds
