"""The list of the survey's models."""

from __future__ import annotations

from dataclasses import replace

from survey.classifiers import pytorchcv_models, timm_models
from survey.language import diffusers_models, open_clip_models, transformers_models
from survey.model import SurveyModel
from survey.vision import (
    monai_models,
    segmentation_models,
    torchvision_models,
    ultralytics_models,
    vit_pytorch_models,
)

#: What a collection is imported as.
PACKAGES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "pytorchcv": "pytorchcv.model_provider",
    "vit-pytorch": "vit_pytorch",
    "segmentation-models": "segmentation_models_pytorch",
    "monai": "monai.networks.nets",
    "ultralytics": "ultralytics.nn.tasks",
    "open_clip": "open_clip",
    "transformers": "transformers",
    "diffusers": "diffusers",
}

_SHUFFLE, _MEAN = "channel shuffle", "statistics over channels"
#: Why absent channels are not like zero ones, by model.
UNLIKE_ZERO = {
    "torchvision/shufflenet_v2_x1_0": _SHUFFLE,
    "pytorchcv/shufflenet_g3_w1": _SHUFFLE,
    "pytorchcv/menet108_8x1_g3": _SHUFFLE,
    "pytorchcv/igcv3_w1": _SHUFFLE,
    "pytorchcv/dicenet_wd2": _SHUFFLE,
    "pytorchcv/cbam_resnet18": _MEAN,  # spatial attention
    "timm/convnextv2_atto": _MEAN,  # global response normalisation
    "diffusers/DiTTransformer2DModel": _MEAN,  # layer norms without weights, which the check does not see
    "timm/nf_resnet26": _MEAN,  # standardised weights
    "timm/dm_nfnet_f0": _MEAN,
}


def survey_models() -> list[SurveyModel]:
    """Every model of the survey, in the order of the table."""
    collections = (
        torchvision_models,
        timm_models,
        pytorchcv_models,
        vit_pytorch_models,
        segmentation_models,
        monai_models,
        ultralytics_models,
        open_clip_models,
        transformers_models,
        diffusers_models,
    )
    models = [model for collection in collections for model in collection()]
    return [replace(model, unlike_zero=UNLIKE_ZERO.get(model.key, "")) for model in models]
