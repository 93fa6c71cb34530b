"""Which slim layer takes the place of which torch layer."""

from __future__ import annotations

from torch import nn

from fastslim.nn.activation import SlimPReLU
from fastslim.nn.attention import SlimMultiheadAttention
from fastslim.nn.batchnorm import SlimBatchNorm1d, SlimBatchNorm2d, SlimBatchNorm3d
from fastslim.nn.conv import SlimConv1d, SlimConv2d, SlimConv3d
from fastslim.nn.conv_transpose import SlimConvTranspose1d, SlimConvTranspose2d, SlimConvTranspose3d
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

_CLASSES: tuple[type[SlimLayer], ...] = (
    SlimConv1d,
    SlimConv2d,
    SlimConv3d,
    SlimConvTranspose1d,
    SlimConvTranspose2d,
    SlimConvTranspose3d,
    SlimLinear,
    SlimBatchNorm1d,
    SlimBatchNorm2d,
    SlimBatchNorm3d,
    SlimLayerNorm,
    SlimRMSNorm,
    SlimGroupNorm,
    SlimInstanceNorm1d,
    SlimInstanceNorm2d,
    SlimInstanceNorm3d,
    SlimPReLU,
    SlimEmbedding,
    SlimMultiheadAttention,
)

#: torch class -> slim class; a layer must be exactly of the torch class.
SLIM_CLASSES: dict[type[nn.Module], type[SlimLayer]] = {slim._plain: slim for slim in _CLASSES}
