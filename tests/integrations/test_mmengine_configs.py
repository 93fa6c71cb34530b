"""Config files: the examples and the page about them, Python and YAML, and the file of a subnet as a config's part."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import mmengine
import mmengine.registry as roots
import pytest
import torch
from mmengine.config import Config
from mmengine_toys import MUTATOR, ModeToy, batch, forget_runs, make, start

import fastslim.integrations.mmengine
import fastslim.registry
from fastslim.integrations.mmengine.search_state import save_subnet

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples" / "mmengine"


@pytest.fixture(autouse=True)
def _no_run_of_another_test() -> Iterator[None]:
    torch.set_num_threads(1)
    forget_runs()
    yield
    forget_runs()


def test_the_example_configs_train_and_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Config.fromfile(EXAMPLES / "autoslim_digits.py")
    assert settings.train_dataloader.dataset.type == "Digits"  # inherited
    settings.model.architecture.width_mult = 0.125
    settings.train_dataloader.dataset = dict(type="fastslim.Digits", train=False)
    settings.train_cfg = dict(type="IterBasedTrainLoop", max_iters=2, val_interval=2)
    settings.default_hooks.checkpoint = dict(type="CheckpointHook", by_epoch=False, interval=2)
    settings.val_cfg.calibrate_sample_num = 64
    runner = start(settings, tmp_path / "train", "example")
    runner.train()
    forget_runs()
    settings = Config.fromfile(EXAMPLES / "autoslim_digits_search.py")
    settings.model.architecture.width_mult = 0.125
    settings.load_from = str(tmp_path / "train" / "iter_2.pth")
    largest = runner.model.subnet_cost(runner.model.mutator.max_choices).multiply_adds / 1e6
    settings.test_cfg.target_flops = (0.95 * largest,)
    found = start(settings, tmp_path / "search", "search").test()
    assert len(found) == 1


def test_a_yaml_config_inherits_and_imports(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "custom_imports: {imports: [fastslim.integrations.mmengine], allow_failed_imports: false}\n"
        "model: {type: fastslim.AutoSlim, num_samples: 1, architecture: {type: fastslim.models.resnet18}}\n"
    )
    (tmp_path / "narrow.yaml").write_text(
        "_base_: base.yaml\n"
        "model:\n"
        "  architecture: {num_classes: 10, in_channels: 1, small_images: true, width_mult: 0.125}\n"
        "  input_shape: [1, 1, 8, 8]\n"
        "  divisor: 2\n"
    )
    model = Config.fromfile(tmp_path / "narrow.yaml").model
    algo = fastslim.registry.MODELS.build(model)
    assert isinstance(algo, fastslim.AutoSlim)
    assert (algo.num_samples, algo.architecture.fc.out_features) == (1, 10)


def test_the_page_names_what_there_is() -> None:
    page = (EXAMPLES.parents[1] / "mmengine.md").read_text()
    for name in set(re.findall(r"\b(?:AutoSlim|Slimmable|Subnet|Evolution)\w*(?:Loop|DDP)\b", page)):
        assert hasattr(fastslim.integrations.mmengine, name), name
    for path in re.findall(r"`?(docs/[\w/.]+)`?", page):
        assert (EXAMPLES.parents[2] / path).exists(), path
    assert {path.name for path in EXAMPLES.glob("*.py")} <= set(re.findall(r"`([\w.]+)`", page))
    code = re.search(r"## Train.*?```python\n(.*?)```", page, re.DOTALL).group(1)
    assert "Runner.from_cfg(config)" in code
    compile(code, "docs/mmengine.md", "exec")


def test_the_files_of_subnets_are_what_a_slimmable_network_lists(tmp_path: Path) -> None:
    supernet, _ = make(ModeToy, torch.float32)
    subnets = [supernet.mutator.min_choices, supernet.uniform_subnet(0.5), supernet.mutator.max_choices]
    for index, subnet in enumerate(subnets):
        save_subnet(tmp_path / f"FLOPS_{index}.yaml", subnet, "found")
    listed = [mmengine.load(tmp_path / f"FLOPS_{index}.yaml") for index in range(3)]
    assert listed == subnets
    mutator = dict(type="SlimmableChannelMutator", channel_unit_cfg=listed, parse_cfg=MUTATOR["parse_cfg"])
    config = dict(type="mmrazor.SlimmableNetwork", architecture=dict(type="ModeToy"), mutator=mutator)
    together = roots.MODELS.build(config)
    assert together.mutator.subnets == subnets
    alone = roots.MODELS.build({**config, "deploy_index": 1})
    assert [alone.architecture.conv1.out_channels, alone.architecture.conv2.out_channels] == list(subnets[1].values())
    losses = alone.train_step(batch(torch.float32), torch.optim.SGD(alone.parameters(), 0.1))
    assert list(losses) == ["loss"]


def test_the_file_of_a_subnet_is_what_a_pruner_retrains(tmp_path: Path) -> None:
    config = dict(
        type="fastslim.AutoSlim",
        architecture=dict(type="ModeToy"),
        pruner=dict(type="RatioPruner", ratios=[i / 12 for i in range(2, 13)]),
        input_shape=(1, 1, 8, 8),
    )
    subnet = roots.MODELS.build(config).mutator.min_choices
    save_subnet(tmp_path / "FLOPS_0.01M.yaml", subnet, "the smallest")
    alone = roots.MODELS.build({**config, "retraining": True, "channel_cfg": str(tmp_path / "FLOPS_0.01M.yaml")})
    assert [alone.architecture.conv1.out_channels, alone.architecture.conv2.out_channels] == list(subnet.values())
    losses = alone.train_step(batch(torch.float32), torch.optim.SGD(alone.parameters(), 0.1))
    assert list(losses) == ["loss"]
