"""From a configuration to data, supernet and device."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from fastslim.algorithms import AutoSlim
from fastslim.data import ImageData, import_function, load_data
from fastslim.engine.config import TrainConfig
from fastslim.engine.split import without_search_part
from fastslim.errors import FastslimTypeError, FastslimValueError, nearest
from fastslim.models import MODEL_BUILDERS, create_model

SMALL_IMAGE_PIXELS = 64


def choose_device(name: str) -> torch.device:
    """The device a configuration names.

    Raises:
        FastslimValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise FastslimValueError(f"device: {name!r} is not a device: use auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise FastslimValueError(
            f"device: {name!r} is not here ({torch.cuda.device_count()} CUDA devices are): use auto or cpu"
        )
    if device.type not in ("cpu", "cuda"):
        raise FastslimValueError(f"device: {name!r} is not supported: use auto, cpu, cuda or cuda:1")
    return device


def build_data(config: TrainConfig) -> ImageData:
    """The datasets, without the training images that are left out for the search."""
    return without_search_part(load_all_data(config), config.search_share)


def load_all_data(config: TrainConfig) -> ImageData:
    """Loads and checks the datasets."""
    return load_data(
        config.data,
        root=config.data_root,
        image_size=config.image_size,
        grayscale=config.grayscale,
        augment=config.augment,
        num_classes=config.num_classes,
        seed=config.seed,
    )


def build_model(config: TrainConfig, data: ImageData) -> nn.Module:
    """The supernet as a plain module; equal seeds give equal weights."""
    torch.manual_seed(config.seed)
    channels, height, width = data.image_shape
    if config.model in MODEL_BUILDERS:
        small = config.small_images
        return create_model(
            config.model,
            num_classes=data.num_classes,
            in_channels=channels,
            small_images=max(height, width) < SMALL_IMAGE_PIXELS if small is None else small,
            width_mult=config.width_mult,
        )
    if ":" not in config.model:
        raise FastslimValueError(f"there is no model {config.model!r}: {nearest(config.model, MODEL_BUILDERS)}")
    function = import_function(config.model)
    parameters = inspect.signature(function).parameters
    options = {"num_classes": data.num_classes, "in_channels": channels, "width_mult": config.width_mult}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    model = function(**{key: value for key, value in options.items() if takes_any or key in parameters})
    if not isinstance(model, nn.Module):
        raise FastslimTypeError(f"{config.model} must return a torch.nn.Module, not a {type(model).__name__}")
    return model


def build_supernet(config: TrainConfig, data: ImageData, device: torch.device) -> AutoSlim:
    """The supernet, ready to train."""
    model = build_model(config, data)
    algo = AutoSlim(
        architecture=model,
        num_samples=config.num_samples,
        example_inputs=torch.zeros(2, *data.image_shape),
        choices=config.choices,
        divisor=config.divisor,
        exclude=config.exclude,
        random_widths=config.random_widths,
        student_loss=config.student_loss,
        grad_reduction=config.grad_reduction,
        loss=nn.CrossEntropyLoss(label_smoothing=config.label_smoothing),
        seed=config.seed,
    )
    return algo.to(device)
