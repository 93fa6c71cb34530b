"""Fastslim's names in mmengine's registries, everyone's classes in fastslim's configs, and the words of errors."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import mmengine.registry as roots
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseDataPreprocessor, ImgDataPreprocessor
from mmengine.registry import DefaultScope, Registry
from mmengine_toys import DISTILLER, MUTATOR, ModeToy, PlainToy, batch, forget_runs
from torch import nn

import fastslim
import fastslim.registry
from fastslim import errors
from fastslim.distillers import KLDivergence
from fastslim.integrations.mmengine import LOOPS, MODEL_WRAPPERS, MODELS, AutoSlim, AutoSlimDDP, SubnetValLoop
from fastslim.mutators import OneShotChannelMutator


@pytest.fixture(autouse=True)
def _no_scope_of_another_test() -> Iterator[None]:
    forget_runs()
    yield
    forget_runs()


@pytest.fixture
def library() -> Iterator[Registry]:
    """Another OpenMMLab library's models."""
    child = Registry("model", parent=roots.MODELS, scope="mmlibrary")
    child.register_module("Classifier", module=ModeToy)
    yield child
    roots.MODELS.children.pop("mmlibrary")


def config(**changes: Any) -> dict[str, Any]:
    return {
        "type": "fastslim.AutoSlim",
        "architecture": dict(type="ModeToy"),
        "mutator": MUTATOR,
        "distiller": DISTILLER,
        **changes,
    }


@pytest.mark.parametrize("name", ["fastslim.AutoSlim", "mmrazor.AutoSlim"])
def test_a_prefix_names_our_algorithm(name: str) -> None:
    algo = roots.MODELS.build(config(type=name))
    assert type(algo) is AutoSlim
    assert isinstance(algo, fastslim.AutoSlim)
    assert isinstance(algo.mutator, OneShotChannelMutator)


@pytest.mark.parametrize("scope", ["fastslim", "mmrazor"])
def test_a_default_scope_needs_no_prefix(scope: str) -> None:
    DefaultScope.get_instance("test", scope_name=scope)
    assert type(roots.MODELS.build(config(type="AutoSlim"))) is AutoSlim
    assert roots.LOOPS.get(f"{scope}.SubnetValLoop") is SubnetValLoop
    assert isinstance(roots.MODELS.build(dict(type="KLDivergence")), KLDivergence)
    assert isinstance(roots.MODELS.build(dict(type="BaseDataPreprocessor")), BaseDataPreprocessor)


def test_every_kind_is_found_under_its_registry() -> None:
    assert roots.MODELS.get("fastslim.OneShotChannelMutator") is OneShotChannelMutator
    assert roots.MODEL_WRAPPERS.get("fastslim.AutoSlimDDP") is AutoSlimDDP
    assert MODEL_WRAPPERS.get("AutoSlimDDP") is roots.MODEL_WRAPPERS.get("mmrazor.AutoSlimDDP")
    assert LOOPS.get("SubnetValLoop") is SubnetValLoop
    assert roots.MODELS.get("fastslim.models.resnet18") is fastslim.models.resnet18
    assert "AutoSlim" not in roots.MODELS.module_dict  # the scope keeps the names apart


def test_our_registries_build_our_names_whatever_the_default_scope_is(library: Registry) -> None:
    DefaultScope.get_instance("test", scope_name="mmlibrary")
    assert type(MODELS.build(config(type="AutoSlim"))) is AutoSlim
    assert isinstance(MODELS.build(Config(dict(type="mmrazor.KLDivergence"))), KLDivergence)
    assert isinstance(MODELS.build(dict(type="Classifier")), ModeToy)


def test_a_scope_inside_a_dict_says_whose_names_it_is_written_in(library: Registry) -> None:
    architecture = dict(_scope_="mmlibrary", type="Classifier")
    mutator, distiller = ({"_scope_": "mmrazor", **part} for part in (MUTATOR, DISTILLER))
    algo = roots.MODELS.build(
        config(_scope_="mmrazor", type="AutoSlim", architecture=architecture, mutator=mutator, distiller=distiller)
    )
    assert isinstance(algo.architecture, ModeToy)
    assert DefaultScope.get_current_instance() is None or DefaultScope.get_current_instance().scope_name != "mmrazor"


@pytest.mark.parametrize("scope", [None, "fastslim", "mmlibrary"])
def test_an_architecture_comes_from_another_library(library: Registry, scope: str | None) -> None:
    if scope:
        DefaultScope.get_instance("test", scope_name=scope)
    algo = roots.MODELS.build(config(architecture=dict(type="mmlibrary.Classifier", width=4)))
    assert algo.architecture.conv1.out_channels == 4
    if scope == "mmlibrary":
        assert isinstance(roots.MODELS.build(config(architecture=dict(type="Classifier"))).architecture, ModeToy)


def test_the_name_in_a_scope_of_another_library_is_not_ours(library: Registry) -> None:
    @library.register_module("KLDivergence")
    class Other(nn.Module):
        pass

    build = fastslim.registry.MODELS.build
    assert isinstance(build(dict(type="KLDivergence", _scope_="mmlibrary")), Other)
    assert isinstance(build(dict(type="mmlibrary.KLDivergence")), Other)
    assert isinstance(build(dict(type="KLDivergence")), KLDivergence)


@pytest.mark.parametrize(
    "registry", [roots.MODELS, MODELS, fastslim.registry.MODELS], ids=["mmengine", "ours", "plain"]
)
def test_classes_of_ones_own_are_built_from_every_registry(registry: Any) -> None:
    names = ["OwnNet", "OwnPreprocessor", "OwnLoss"]

    class OwnNet(PlainToy):
        pass

    class OwnPreprocessor(nn.Module):
        def forward(self, data: Any, training: bool = False) -> Any:
            return data["inputs"], data["data_samples"]

    class OwnLoss(nn.Module):
        def __init__(self, loss_weight: float = 1.0) -> None:
            super().__init__()
            self.loss_weight = loss_weight

        def forward(self, preds_S: torch.Tensor, preds_T: torch.Tensor) -> torch.Tensor:
            return self.loss_weight * (preds_S - preds_T).square().mean()

    for name, module in zip(names, (OwnNet, OwnPreprocessor, OwnLoss), strict=True):
        registry.register_module(name, module=module)
    try:
        algo = roots.MODELS.build(
            config(
                architecture=dict(type="OwnNet"),
                data_preprocessor=dict(type="OwnPreprocessor"),
                distiller={**DISTILLER, "distill_losses": dict(loss_kl=dict(type="OwnLoss", loss_weight=0.0))},
            )
        )
        losses = algo.train_step(batch(torch.float32), torch.optim.SGD(algo.parameters(), 0.1))
    finally:
        for name in names:
            del registry.module_dict[name]
    assert type(algo.architecture) is OwnNet
    assert type(algo.data_preprocessor) is OwnPreprocessor
    assert losses["max_subnet.loss"] > 0
    assert losses["min_subnet.loss_kl"] == 0


def test_a_connector_of_ones_own_is_built(library: Registry) -> None:
    calls = []

    @library.register_module()
    class Halving(nn.Module):
        def forward(self, record: torch.Tensor) -> torch.Tensor:
            calls.append(record.shape)
            return record / 2

    mappings = DISTILLER["loss_forward_mappings"]["loss_kl"]
    distiller = {
        **DISTILLER,
        "connectors": dict(halved=dict(type="mmlibrary.Halving")),
        "loss_forward_mappings": dict(loss_kl={**mappings, "preds_S": {**mappings["preds_S"], "connector": "halved"}}),
    }
    algo = roots.MODELS.build(config(distiller=distiller))
    algo.train_step(batch(torch.float32), torch.optim.SGD(algo.parameters(), 0.1))
    assert len(calls) == 3


def test_configs_of_mmengine_are_dicts_to_us() -> None:
    for wrap in (ConfigDict, Config):
        algo = fastslim.registry.MODELS.build(wrap(config(distiller=None, architecture=dict(type=PlainToy))))
        assert isinstance(algo, fastslim.AutoSlim)
    loss = fastslim.registry.MODELS.build(dict(type="KLDivergence"), default_args=dict(tau=3.0))
    assert loss.tau == 3.0


def test_a_preprocessor_without_type_is_mmengines() -> None:
    assert type(roots.MODELS.build(config()).data_preprocessor) is BaseDataPreprocessor
    images = roots.MODELS.build(config(data_preprocessor=dict(type="ImgDataPreprocessor", mean=[1.0], std=[2.0])))
    assert type(images.data_preprocessor) is ImgDataPreprocessor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(type="fastslim.AutoSlimm"), "'AutoSlimm' is not registered .*did you mean 'AutoSlim'"),
        (dict(num_sample=3), "AutoSlim has no argument 'num_sample': did you mean 'num_samples'"),
        (dict(mutator={**MUTATOR, "type": "OneShotChannelMutaror"}), "did you mean 'OneShotChannelMutator'"),
        (dict(mutator={**MUTATOR, "parse_config": {}}), "has no argument 'parse_config': did you mean 'parse_cfg'"),
        (dict(architecture=dict(type="ModToy")), "'ModToy' is not registered .*did you mean 'ModeToy'"),
        (dict(architecture=dict(type="ModeToy", widht=3)), "ModeToy has no argument 'widht': did you mean 'width'"),
        (dict(architecture=dict(type="mmabsent.ResNet")), "'mmabsent.ResNet' is not registered .*scope 'mmabsent'"),
        (dict(data_preprocessor=dict(type="BaseDataPreprocesor")), "did you mean 'BaseDataPreprocessor'"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.FastslimValueError, match=message):
        roots.MODELS.build(config(**changes))


def test_a_misspelt_loop_and_its_arguments_are_answered_with_the_nearest() -> None:
    with pytest.raises(errors.FastslimValueError, match="did you mean 'AutoSlimGreedySearchLoop'"):
        roots.LOOPS.get("fastslim.AutoSlimGredySearchLoop")
    with pytest.raises(errors.FastslimValueError, match="no argument 'target_flop': did you mean 'target_flops'"):
        roots.LOOPS.build(dict(type="mmrazor.AutoSlimGreedySearchLoop", target_flop=(1,)))


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_fastslim_alone_imports_no_framework() -> None:
    code = (
        "import fastslim, sys; print([n for n in ('mmengine', 'cv2', 'matplotlib', 'lightning') if n in sys.modules])"
    )
    assert run_python(code).strip() == "[]"


def test_without_mmengine_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "fastslim.integrations.mmengine"
    package = sys.modules[name]
    monkeypatch.setitem(sys.modules, "mmengine", None)
    with pytest.raises(errors.FastslimRuntimeError, match=r"pip install 'fastslim\[mmengine\]'"):
        importlib.reload(package)
