"""Distillation between subnets: recorders keep features, losses compare them."""

from fastslim.distillers.configurable_distiller import ConfigurableDistiller
from fastslim.distillers.deliveries import Delivery, DeliveryManager, FunctionOutputsDelivery, MethodOutputsDelivery
from fastslim.distillers.losses import KDSoftCELoss, KLDivergence, L1Loss, L2Loss
from fastslim.distillers.recorder_manager import RecorderManager
from fastslim.distillers.recorders import (
    FunctionInputsRecorder,
    FunctionOutputsRecorder,
    MethodInputsRecorder,
    MethodOutputsRecorder,
    ModuleInputsRecorder,
    ModuleOutputsRecorder,
    ParameterRecorder,
    Recorder,
)

__all__ = [
    "ConfigurableDistiller",
    "Delivery",
    "DeliveryManager",
    "FunctionInputsRecorder",
    "FunctionOutputsDelivery",
    "FunctionOutputsRecorder",
    "KDSoftCELoss",
    "KLDivergence",
    "L1Loss",
    "L2Loss",
    "MethodInputsRecorder",
    "MethodOutputsDelivery",
    "MethodOutputsRecorder",
    "ModuleInputsRecorder",
    "ModuleOutputsRecorder",
    "ParameterRecorder",
    "Recorder",
    "RecorderManager",
]
