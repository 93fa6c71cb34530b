"""MMRazor's own form of a config: a classifier of another library, `_scope_`, data samples, image preprocessing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mmengine.registry as roots
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel, BaseModule, ImgDataPreprocessor
from mmengine.registry import Registry
from mmengine.structures import BaseDataElement
from mmengine_toys import DISTILLER, MUTATOR, forget_runs, start
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastslim.integrations.mmengine import AutoSlim


class Backbone(BaseModule):
    def __init__(self, widen_factor: float = 1.0) -> None:
        super().__init__([dict(type="Constant", layer="BatchNorm2d", val=0.75)])
        width = int(8 * widen_factor)
        self.conv1, self.norm1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * width)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).relu(),)


class Pooling(nn.Module):
    def forward(self, features: tuple[Tensor]) -> tuple[Tensor]:
        return tuple(F.adaptive_avg_pool2d(x, 1).flatten(1) for x in features)


class Head(BaseModule):
    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, features: tuple[Tensor]) -> Tensor:
        return self.fc(features[-1])


class Classifier(BaseModel):
    """Builds its parts by its own library's registry; the modes and data samples of OpenMMLab's classifiers."""

    def __init__(self, backbone: Any, neck: Any, head: Any, data_preprocessor: Any = None) -> None:
        super().__init__(data_preprocessor)
        build = roots.MODELS.children["mmlibrary"].build
        self.backbone, self.neck, self.head = build(backbone), build(neck), build(head)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor") -> Any:
        logits = self.head(self.neck(self.backbone(inputs)))
        if mode == "tensor":
            return logits
        if mode == "loss":
            return {"loss": F.cross_entropy(logits, torch.cat([sample.gt_label for sample in data_samples]))}
        for sample, score in zip(data_samples, logits, strict=True):
            sample.set_field(score.argmax(0, keepdim=True), "pred_label")
        return data_samples


class Bright(Dataset):
    """Byte images of three brightnesses, each with a data sample."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = torch.randint(0, 40, (3, 8, 8), generator=torch.Generator().manual_seed(index))
        sample = BaseDataElement()
        sample.gt_label = torch.tensor([index % 3])
        return {"inputs": (noise + 80 * (index % 3)).byte(), "data_samples": sample}


class Accuracy(BaseMetric):
    default_prefix = "accuracy"

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += [int(sample["pred_label"]) == int(sample["gt_label"]) for sample in data_samples]

    def compute_metrics(self, results: list[bool]) -> dict[str, float]:
        return {"top1": 100 * sum(results) / len(results)}


@pytest.fixture(autouse=True)
def _library() -> Iterator[None]:
    forget_runs()
    models = Registry("model", parent=roots.MODELS, scope="mmlibrary")
    for module in (Backbone, Pooling, Head, Classifier):
        models.register_module(module=module)
    Registry("dataset", parent=roots.DATASETS, scope="mmlibrary").register_module(module=Bright)
    Registry("metric", parent=roots.METRICS, scope="mmlibrary").register_module(module=Accuracy)
    yield
    for root in (roots.MODELS, roots.DATASETS, roots.METRICS):
        root.children.pop("mmlibrary")
    forget_runs()


def supernet_config() -> Config:
    """As MMRazor's own configs are written; the supernet comes from the other library's config, with its scope."""
    mutator, distiller = copy.deepcopy(MUTATOR), copy.deepcopy(DISTILLER)
    mutator["parse_cfg"]["demo_input"] = (1, 3, 8, 8)
    for recorders in ("teacher_recorders", "student_recorders"):
        distiller[recorders]["fc"]["source"] = "head.fc"
    supernet = dict(
        _scope_="mmlibrary",
        type="Classifier",
        backbone=dict(type="Backbone", widen_factor=1.5),
        neck=dict(type="Pooling"),
        head=dict(type="Head", num_classes=3, in_channels=24),
    )
    loader = dict(batch_size=16, num_workers=0, dataset=dict(type="Bright"))
    loader["sampler"] = dict(type="DefaultSampler", shuffle=True)
    return Config(
        dict(
            default_scope="mmlibrary",
            model=dict(
                _scope_="mmrazor",
                type="AutoSlim",
                num_random_samples=2,
                architecture=supernet,
                data_preprocessor=dict(type="ImgDataPreprocessor", mean=[100.0] * 3, std=[60.0] * 3),
                distiller=distiller,
                mutator=mutator,
            ),
            model_wrapper_cfg=dict(type="mmrazor.AutoSlimDDP", broadcast_buffers=False, find_unused_parameters=False),
            train_dataloader=loader,
            val_dataloader=loader,
            val_evaluator=dict(type="Accuracy"),
            optim_wrapper=dict(
                optimizer=dict(type="SGD", lr=0.2, momentum=0.9, weight_decay=1e-4),
                paramwise_cfg=dict(bias_decay_mult=0.0, norm_decay_mult=0.0, dwconv_decay_mult=0.0),
                accumulative_counts=4,
            ),
            train_cfg=dict(by_epoch=True, max_epochs=3, val_interval=3),
            val_cfg=dict(type="mmrazor.SubnetValLoop", calibrate_sample_num=48),
            custom_hooks=[dict(type="EMAHook", momentum=0.5)],
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", save_best="max_subnet.accuracy/top1")),
            randomness=dict(seed=0),
        )
    )


def test_a_supernet_of_another_library_trains_by_mmrazors_config(tmp_path: Path) -> None:
    runner = start(supernet_config(), tmp_path, "classifier")
    assert type(runner.model) is AutoSlim
    assert type(runner.model.architecture) is Classifier
    assert type(runner.model.data_preprocessor) is ImgDataPreprocessor
    runner.train()
    assert (tmp_path / "best_max_subnet.accuracy_top1_epoch_3.pth").exists()
    metrics = runner.val_loop.run()
    assert metrics["max_subnet.accuracy/top1"] > 90  # three classes
    assert metrics["min_subnet.accuracy/top1"] > 60
    assert "random_subnet_1.accuracy/top1" in metrics


def test_averaged_weights_are_evaluated_at_every_width(tmp_path: Path) -> None:
    """EMAHook swaps them in before a validation and out after it: once, however many subnets there are."""
    runner = start(supernet_config(), tmp_path, "averaged")
    runner.train()
    hook = next(hook for hook in runner.hooks if isinstance(hook, EMAHook))
    averaged = hook.ema_model.module.architecture.state_dict()
    own = runner.model.architecture.state_dict()
    before = {key: value.clone() for key, value in own.items()}
    assert not torch.equal(averaged["backbone.conv1.weight"], own["backbone.conv1.weight"])
    seen = []
    runner.model.register_forward_hook(lambda *_: seen.append(runner.model.architecture.backbone.conv1.weight.clone()))
    expected = averaged["backbone.conv1.weight"].clone()
    runner.val_loop.run()
    assert seen
    assert all(torch.equal(weight, expected) for weight in seen)
    assert all(torch.equal(value, before[key]) for key, value in runner.model.architecture.state_dict().items())


def test_weights_are_initialised_as_the_library_says(tmp_path: Path) -> None:
    settings = supernet_config()
    settings.train_cfg.max_epochs = 0
    runner = start(settings, tmp_path, "initialised")
    runner.train()
    assert bool((runner.model.architecture.backbone.norm1.weight == 0.75).all())
