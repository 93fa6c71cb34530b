"""Layers that run at any width: drop-in for the torch classes, same state_dict keys."""

from fastslim.nn.batchnorm import SlimBatchNorm2d, SwitchableBatchNorm2d
from fastslim.nn.conv import SlimConv2d
from fastslim.nn.linear import SlimLinear
from fastslim.nn.slim import SlimLayer

__all__ = ["SlimBatchNorm2d", "SlimConv2d", "SlimLayer", "SlimLinear", "SwitchableBatchNorm2d"]
