"""Torchvision, segmentation, volumes, detection and small transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from survey.model import (
    SurveyModel,
    image,
    monai_model,
    smp_model,
    torchvision_model,
    torchvision_raft,
    torchvision_video,
    ultralytics_model,
    vit_pytorch_model,
)


def torchvision_models() -> list[SurveyModel]:
    sizes = {
        "alexnet": 96, "vgg16_bn": 64, "resnet18": 64, "resnet50": 64, "resnext50_32x4d": 64,
        "wide_resnet50_2": 64, "densenet121": 64, "inception_v3": 299, "googlenet": 64, "mobilenet_v2": 64,
        "mobilenet_v3_small": 64, "mobilenet_v3_large": 64, "mnasnet1_0": 64, "shufflenet_v2_x1_0": 64,
        "efficientnet_b0": 64, "efficientnet_v2_s": 64, "regnet_x_400mf": 64, "regnet_y_400mf": 64,
        "convnext_tiny": 64, "squeezenet1_0": 64, "deeplabv3_resnet50": 64, "fcn_resnet50": 64,
        "lraspp_mobilenet_v3_large": 64,
    }  # fmt: skip
    extra: dict[str, dict[str, Any]] = {"inception_v3": {"init_weights": False}, "googlenet": {"init_weights": False}}
    models = [
        SurveyModel("torchvision", name, "cnn", partial(torchvision_model, name, size, **extra.get(name, {})))
        for name, size in sizes.items()
    ]
    vit = {"image_size": 64, "num_classes": 10}
    models += [
        SurveyModel("torchvision", "vit_b_16", "transformer", partial(torchvision_model, "vit_b_16", 64, **vit)),
        SurveyModel("torchvision", "swin_t", "transformer", partial(torchvision_model, "swin_t", 64)),
        SurveyModel("torchvision", "swin_v2_t", "transformer", partial(torchvision_model, "swin_v2_t", 64)),
        SurveyModel("torchvision", "maxvit_t", "hybrid", partial(torchvision_model, "maxvit_t", 224)),
    ]
    for name in ("r3d_18", "mc3_18", "r2plus1d_18"):
        models.append(SurveyModel("torchvision", name, "cnn", partial(torchvision_video, name)))
    models.append(SurveyModel("torchvision", "swin3d_t", "transformer", partial(torchvision_video, "swin3d_t")))
    models.append(SurveyModel("torchvision", "raft_small", "cnn", torchvision_raft))
    return models


def vit_pytorch_models() -> list[SurveyModel]:
    vit = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 64, "depth": 2, "heads": 4, "mlp_dim": 128}
    specs: list[tuple[str, str, str, dict[str, Any]]] = [
        ("vit_pytorch.vit", "ViT", "transformer", vit),
        ("vit_pytorch.simple_vit", "SimpleViT", "transformer", vit),
        ("vit_pytorch.deepvit", "DeepViT", "transformer", vit),
        ("vit_pytorch.cait", "CaiT", "transformer", vit | {"cls_depth": 1}),
        ("vit_pytorch.pit", "PiT", "transformer", vit | {"depth": (1, 1)}),
        ("vit_pytorch.cct", "CCT", "hybrid", {
            "img_size": 32, "embedding_dim": 64, "n_conv_layers": 1, "num_layers": 2, "num_heads": 4, "mlp_ratio": 2.0,
            "num_classes": 5, "positional_embedding": "learnable"}),
        ("vit_pytorch.cvt", "CvT", "hybrid", {"num_classes": 5, "s3_depth": 2}),
        ("vit_pytorch.xcit", "XCiT", "hybrid", vit | {"cls_depth": 1, "dim_head": 16}),
        ("vit_pytorch.parallel_vit", "ViT", "transformer", vit | {"num_parallel_branches": 2}),
    ]  # fmt: skip
    models = []
    for module, cls, kind, options in specs:
        name = f"{module.split('.')[-1]}"
        size = 64 if cls == "CvT" else 32
        models.append(SurveyModel("vit-pytorch", name, kind, partial(vit_pytorch_model, module, cls, size, **options)))
    return models


def segmentation_models() -> list[SurveyModel]:
    specs = [
        ("Unet", "resnet18"), ("UnetPlusPlus", "resnet18"), ("FPN", "mobilenet_v2"), ("PSPNet", "resnet18"),
        ("PAN", "resnet18"), ("DeepLabV3Plus", "resnet18"), ("Linknet", "vgg11_bn"), ("MAnet", "resnet18"),
        ("UPerNet", "efficientnet-b0"), ("Segformer", "mit_b0"),
    ]  # fmt: skip
    models = []
    for cls, encoder in specs:
        kind = "hybrid" if cls == "Segformer" else "cnn"
        size = 128 if cls == "PAN" else 64
        build = partial(smp_model, cls, encoder, size)
        models.append(SurveyModel("segmentation-models", f"{cls}-{encoder}", kind, build))
    return models


def monai_models() -> list[SurveyModel]:
    volume = partial(image, 32, 1, 1, 3)
    unet = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3}
    stages = {"channels": (16, 32, 64), "strides": (2, 2)}
    specs: list[tuple[str, str, Callable, dict[str, Any]]] = [
        ("UNet", "cnn", volume, unet | stages | {"num_res_units": 2}),
        ("AttentionUnet", "cnn", volume, unet | stages),
        ("BasicUNet", "cnn", volume, unet | {"features": (16, 16, 32, 32, 64, 16)}),
        ("SegResNet", "cnn", volume, unet | {"init_filters": 16}),
        ("DenseNet121", "cnn", volume, unet),
        ("DynUNet", "cnn", volume, unet | {
            "kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [16, 32, 64]}),
        ("UNETR", "hybrid", volume, unet | {
            "img_size": 32, "feature_size": 16, "hidden_size": 48, "mlp_dim": 96, "num_heads": 4}),
    ]  # fmt: skip
    return [SurveyModel("monai", cls, kind, partial(monai_model, cls, inputs, **options))
            for cls, kind, inputs, options in specs]  # fmt: skip


def ultralytics_models() -> list[SurveyModel]:
    specs = {"yolov5n.yaml": "DetectionModel", "yolov8n.yaml": "DetectionModel", "yolo11n.yaml": "DetectionModel",
             "yolov10n.yaml": "DetectionModel", "yolov8n-seg.yaml": "SegmentationModel",
             "yolov8n-pose.yaml": "PoseModel", "yolo11n-cls.yaml": "ClassificationModel"}  # fmt: skip
    return [SurveyModel("ultralytics", config.removesuffix(".yaml"), "cnn", partial(ultralytics_model, config, cls))
            for config, cls in specs.items()]  # fmt: skip
