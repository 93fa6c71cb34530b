"""MMRazor's names of the slim layers, its *dynamic ops*.

They differ from MMRazor's in keeping the weights (`convert_from`), in taking every `padding_mode`, and in normalising
inputs of any number of dimensions (`DynamicLayerNorm`).

Example:
    >>> conv = DynamicConv2d(4, 10, 3)
    >>> conv.register_mutable_attr("out_channels", SequentialMutableChannel(10))
    >>> conv.get_mutable_attr("out_channels").current_choice = 6
    >>> conv(torch.randn(1, 4, 8, 8)).shape
    torch.Size([1, 6, 6, 6])
"""

from __future__ import annotations

from fastslim.nn.batchnorm import SlimBatchNorm, SlimBatchNorm1d, SlimBatchNorm2d, SlimBatchNorm3d
from fastslim.nn.conv import SlimConv2d, SlimConvolution
from fastslim.nn.linear import SlimLinear
from fastslim.nn.norm import SlimLayerNorm
from fastslim.registry import MODELS

DynamicConvMixin, DynamicLinearMixin = SlimConvolution, SlimLinear
DynamicBatchNormMixin, DynamicLayerNormMixin = SlimBatchNorm, SlimLayerNorm
DynamicConv2d, DynamicLinear, DynamicLayerNorm = SlimConv2d, SlimLinear, SlimLayerNorm
DynamicBatchNorm1d, DynamicBatchNorm2d, DynamicBatchNorm3d = SlimBatchNorm1d, SlimBatchNorm2d, SlimBatchNorm3d

for _name, _layer in {
    "DynamicConv2d": SlimConv2d,
    "DynamicLinear": SlimLinear,
    "DynamicBatchNorm1d": SlimBatchNorm1d,
    "DynamicBatchNorm2d": SlimBatchNorm2d,
    "DynamicBatchNorm3d": SlimBatchNorm3d,
    "DynamicLayerNorm": SlimLayerNorm,
}.items():
    MODELS.register_module(_name, module=_layer)
