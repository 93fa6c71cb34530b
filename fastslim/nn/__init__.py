"""Layers that run at any width: drop-in for the torch classes, same state_dict keys."""

from fastslim.nn.activation import SlimPReLU
from fastslim.nn.attention import SlimMultiheadAttention
from fastslim.nn.batchnorm import (
    SlimBatchNorm,
    SlimBatchNorm1d,
    SlimBatchNorm2d,
    SlimBatchNorm3d,
)
from fastslim.nn.classes import SLIM_CLASSES
from fastslim.nn.conv import SlimConv1d, SlimConv2d, SlimConv3d
from fastslim.nn.conv_transpose import SlimConvTranspose1d, SlimConvTranspose2d, SlimConvTranspose3d
from fastslim.nn.dynamic import (
    DynamicBatchNorm1d,
    DynamicBatchNorm2d,
    DynamicBatchNorm3d,
    DynamicBatchNormMixin,
    DynamicConv2d,
    DynamicConvMixin,
    DynamicLayerNorm,
    DynamicLayerNormMixin,
    DynamicLinear,
    DynamicLinearMixin,
)
from fastslim.nn.dynamic_mixin import DynamicChannelMixin, DynamicMixin, active_segments, runs
from fastslim.nn.embedding import SlimEmbedding
from fastslim.nn.linear import SlimLinear
from fastslim.nn.norm import (
    SlimGroupNorm,
    SlimInstanceNorm1d,
    SlimInstanceNorm2d,
    SlimInstanceNorm3d,
    SlimLayerNorm,
    SlimRMSNorm,
)
from fastslim.nn.slim import SlimLayer
from fastslim.nn.switchable import IndexedBatchNorm2d, SwitchableBatchNorm2d
from fastslim.nn.transformer import turn_off_fast_paths

__all__ = [
    "SLIM_CLASSES",
    "DynamicBatchNorm1d",
    "DynamicBatchNorm2d",
    "DynamicBatchNorm3d",
    "DynamicBatchNormMixin",
    "DynamicChannelMixin",
    "DynamicConv2d",
    "DynamicConvMixin",
    "DynamicLayerNorm",
    "DynamicLayerNormMixin",
    "DynamicLinear",
    "DynamicLinearMixin",
    "DynamicMixin",
    "IndexedBatchNorm2d",
    "SlimBatchNorm",
    "SlimBatchNorm1d",
    "SlimBatchNorm2d",
    "SlimBatchNorm3d",
    "SlimConv1d",
    "SlimConv2d",
    "SlimConv3d",
    "SlimConvTranspose1d",
    "SlimConvTranspose2d",
    "SlimConvTranspose3d",
    "SlimEmbedding",
    "SlimGroupNorm",
    "SlimInstanceNorm1d",
    "SlimInstanceNorm2d",
    "SlimInstanceNorm3d",
    "SlimLayer",
    "SlimLayerNorm",
    "SlimLinear",
    "SlimMultiheadAttention",
    "SlimPReLU",
    "SlimRMSNorm",
    "SwitchableBatchNorm2d",
    "active_segments",
    "runs",
    "turn_off_fast_paths",
]
