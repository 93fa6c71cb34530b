"""Distillation between subnets: recorders keep features, connectors bring them together, losses compare them."""

from fastslim.distillers.alpha_divergence import AdaptiveLossSoft
from fastslim.distillers.attention_connectors import BYOTConnector, FBKDStudentConnector, FBKDTeacherConnector
from fastslim.distillers.call_recorders import (
    FunctionInputsRecorder,
    FunctionOutputsRecorder,
    MethodInputsRecorder,
    MethodOutputsRecorder,
)
from fastslim.distillers.configurable_distiller import ConfigurableDistiller
from fastslim.distillers.connectors import (
    BaseConnector,
    ConvModuleConnector,
    LinearConnector,
    NormConnector,
    TorchFunctionalConnector,
    TorchNNConnector,
)
from fastslim.distillers.contrastive_loss import CRDLoss
from fastslim.distillers.data_free_losses import ActivationLoss, InformationEntropyLoss, OnehotLikeLoss
from fastslim.distillers.deliveries import (
    DistillDelivery,
    DistillDeliveryManager,
    FunctionOutputsDelivery,
    MethodOutputsDelivery,
)
from fastslim.distillers.feature_losses import ABLoss, ATLoss, FTLoss, L1Loss, L2Loss, MGDLoss, OFDLoss
from fastslim.distillers.losses import WSLD, CrossEntropyLoss, DISTLoss, DKDLoss, KDSoftCELoss, KLDivergence
from fastslim.distillers.recorder_manager import RecorderManager
from fastslim.distillers.recorders import ModuleInputsRecorder, ModuleOutputsRecorder, ParameterRecorder, Recorder
from fastslim.distillers.relation_losses import AngleWiseRKD, ChannelWiseDivergence, DistanceWiseRKD, FBKDLoss, PKDLoss
from fastslim.distillers.self_distiller import BYOTDistiller, SelfDistiller
from fastslim.distillers.transfer_connectors import CRDConnector, MGDConnector, Paraphraser, Translator

__all__ = [
    "WSLD",
    "ABLoss",
    "ATLoss",
    "ActivationLoss",
    "AdaptiveLossSoft",
    "AngleWiseRKD",
    "BYOTConnector",
    "BYOTDistiller",
    "BaseConnector",
    "CRDConnector",
    "CRDLoss",
    "ChannelWiseDivergence",
    "ConfigurableDistiller",
    "ConvModuleConnector",
    "CrossEntropyLoss",
    "DISTLoss",
    "DKDLoss",
    "DistanceWiseRKD",
    "DistillDelivery",
    "DistillDeliveryManager",
    "FBKDLoss",
    "FBKDStudentConnector",
    "FBKDTeacherConnector",
    "FTLoss",
    "FunctionInputsRecorder",
    "FunctionOutputsDelivery",
    "FunctionOutputsRecorder",
    "InformationEntropyLoss",
    "KDSoftCELoss",
    "KLDivergence",
    "L1Loss",
    "L2Loss",
    "LinearConnector",
    "MGDConnector",
    "MGDLoss",
    "MethodInputsRecorder",
    "MethodOutputsDelivery",
    "MethodOutputsRecorder",
    "ModuleInputsRecorder",
    "ModuleOutputsRecorder",
    "NormConnector",
    "OFDLoss",
    "OnehotLikeLoss",
    "PKDLoss",
    "ParameterRecorder",
    "Paraphraser",
    "Recorder",
    "RecorderManager",
    "SelfDistiller",
    "TorchFunctionalConnector",
    "TorchNNConnector",
    "Translator",
]
