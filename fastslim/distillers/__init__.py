"""Distillation between subnets: recorders keep features, connectors bring them together, losses compare them."""

from fastslim.distillers.call_recorders import (
    FunctionInputsRecorder,
    FunctionOutputsRecorder,
    MethodInputsRecorder,
    MethodOutputsRecorder,
)
from fastslim.distillers.configurable_distiller import ConfigurableDistiller
from fastslim.distillers.deliveries import (
    DistillDelivery,
    DistillDeliveryManager,
    FunctionOutputsDelivery,
    MethodOutputsDelivery,
)
from fastslim.distillers.losses import KDSoftCELoss, KLDivergence, L1Loss, L2Loss
from fastslim.distillers.recorder_manager import RecorderManager
from fastslim.distillers.recorders import ModuleInputsRecorder, ModuleOutputsRecorder, ParameterRecorder, Recorder

__all__ = [
    "ConfigurableDistiller",
    "DistillDelivery",
    "DistillDeliveryManager",
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
