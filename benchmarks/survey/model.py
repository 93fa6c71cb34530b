"""How a model of the survey is described, and how each collection builds one, small and with random weights.

Each builder imports its collection when called, so that a missing one costs only its own models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, Any]


@dataclass(frozen=True)
class SurveyModel:
    """One model of the survey; `build` returns it with example inputs (a tuple, or a dict of keyword arguments)."""

    collection: str
    name: str
    kind: str  # "cnn", "transformer" (attention or mixing over tokens), "hybrid" (both)
    build: Callable[[], Built]
    #: Why a channel that is absent is not the same as one that is zero: it shuffles channels, or combines values over
    #: them (their mean, their norm) elsewhere than in a layer or RMS norm.
    unlike_zero: str = ""

    @property
    def key(self) -> str:
        return f"{self.collection}/{self.name}"


def image(size: int = 64, channels: int = 3, batch: int = 2, dims: int = 2) -> tuple[torch.Tensor]:
    return (torch.randn(batch, channels, *([size] * dims)),)


def tokens(vocabulary: int = 100, length: int = 12, batch: int = 2) -> torch.Tensor:
    return torch.randint(5, vocabulary, (batch, length))


def torchvision_model(name: str, size: int, **options: Any) -> Built:
    models = import_module("torchvision.models")
    if name.startswith(("deeplab", "fcn", "lraspp")):
        options |= {"weights_backbone": None, "num_classes": 5}
    return models.get_model(name, weights=None, **options), image(size)


def torchvision_video(name: str, size: int = 32) -> Built:
    build = getattr(import_module("torchvision.models.video"), name)
    return build(weights=None), (torch.randn(2, 3, 8, size, size),)


def torchvision_raft() -> Built:
    build = import_module("torchvision.models.optical_flow").raft_small
    return build(weights=None), (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128), 2)


def timm_model(name: str, size: int, **options: Any) -> Built:
    return import_module("timm").create_model(name, pretrained=False, **options), image(size)


def pytorchcv_model(name: str, size: int, **options: Any) -> Built:
    return import_module("pytorchcv.model_provider").get_model(name, pretrained=False, **options), image(size)


def vit_pytorch_model(module: str, cls: str, size: int, **options: Any) -> Built:
    return getattr(import_module(module), cls)(**options), image(size)


def smp_model(cls: str, encoder: str, size: int = 64, **options: Any) -> Built:
    build = getattr(import_module("segmentation_models_pytorch"), cls)
    return build(encoder_name=encoder, encoder_weights=None, classes=4, **options), image(size)


def monai_model(cls: str, inputs: Callable[[], tuple], **options: Any) -> Built:
    return getattr(import_module("monai.networks.nets"), cls)(**options), inputs()


def ultralytics_model(config: str, cls: str = "DetectionModel", size: int = 64) -> Built:
    build = getattr(import_module("ultralytics.nn.tasks"), cls)
    return build(config, verbose=False), image(size)


def open_clip_model(text: dict[str, Any], vision: dict[str, Any], cls: str = "CLIP") -> Built:
    model = getattr(import_module("open_clip.model"), cls)(64, vision, text)
    return model, {"image": image(32)[0], "text": tokens(100, 16)}


def transformers_model(cls: str, config: str, inputs: Callable[[], dict], **options: Any) -> Built:
    library = import_module("transformers")
    return getattr(library, cls)(getattr(library, config)(**options)), inputs()


def diffusers_model(cls: str, inputs: Callable[[], dict], **options: Any) -> Built:
    return getattr(import_module("diffusers"), cls)(**options), inputs()
