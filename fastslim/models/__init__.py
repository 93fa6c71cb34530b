"""Plain torch networks to train; state_dict keys and shapes are those of torchvision, so public weights load."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fastslim.errors import FastslimValueError, nearest
from fastslim.models.mnasnet import MNASNet, mnasnet
from fastslim.models.mobilenet import MobileNetV2, mobilenet_v2
from fastslim.models.mobilenet_v1 import MobileNetV1, mobilenet_v1
from fastslim.models.resnet import ResNet, resnet18, resnet50

MODEL_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "mnasnet": mnasnet,
}


def create_model(name: str, **options: object) -> nn.Module:
    """Builds a network by name, as configuration files name it.

    Args:
        name: one of ``MODEL_BUILDERS``.
        options: arguments of the builder (``num_classes``, ``in_channels``, ``small_images``, ``width_mult``).

    Returns:
        The network, freshly initialised.

    Raises:
        FastslimValueError: an unknown name (the nearest known one is given) or an impossible option.
    """
    if name not in MODEL_BUILDERS:
        raise FastslimValueError(f"there is no model {name!r}: {nearest(name, MODEL_BUILDERS)}")
    return MODEL_BUILDERS[name](**options)


__all__ = [
    "MODEL_BUILDERS",
    "MNASNet",
    "MobileNetV1",
    "MobileNetV2",
    "ResNet",
    "create_model",
    "mnasnet",
    "mobilenet_v1",
    "mobilenet_v2",
    "resnet18",
    "resnet50",
]
