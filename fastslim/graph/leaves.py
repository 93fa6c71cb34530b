"""Modules that are not looked into: torch's layers with weights, and what torch makes of them."""

from __future__ import annotations

from torch import nn

from fastslim.nn import SlimLayer

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.RMSNorm,
    nn.PReLU,
    nn.Embedding,
    nn.MultiheadAttention,
)


def is_leaf(module: nn.Module) -> bool:
    """Whether a call of the module is one node."""
    if isinstance(module, (SlimLayer, nn.RNNBase, nn.RNNCellBase)) or type(module) in LAYERS:
        return True
    home = type(module).__module__
    if home.startswith(("torch.ao.", "torch.nn.quantized", "torch.nn.intrinsic")):
        return True
    return home.startswith("torch.nn.modules") and not module._modules and not module._parameters
