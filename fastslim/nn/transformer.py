"""Torch's transformer encoders have fast paths for evaluation that read the full weights of their layers."""

from __future__ import annotations

from torch import nn

from fastslim.nn.slim import SlimLayer


def turn_off_fast_paths(model: nn.Module) -> None:
    """Lets every torch encoder in `model` that holds a slim layer call its layers instead of reading their weights.

    To be called after slim layers have been put into a model. Without it an encoder layer whose
    attention is plain, but not its linear layers, would run at full width in evaluation, and an
    encoder would make nested tensors of padded batches.
    """
    for module in model.modules():
        if not isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            continue
        if not any(isinstance(part, SlimLayer) for part in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        else:
            module.activation_relu_or_gelu = 0  # torch asks it for nothing but the fast path
