"""Which parts of weights a subnet's convolutions read from dense memory, so that they can be packed together."""

from __future__ import annotations

import torch
from torch import Tensor

from fastslim.graph.units import active
from fastslim.mutators.channel_mutator import ChannelMutator
from fastslim.nn import SlimConv2d
from fastslim.ops.step_buffers import autocast_dtype_on
from fastslim.ops.weight_cache import Prefix


def dense_weights(mutator: ChannelMutator) -> list[tuple[Tensor, torch.dtype, Prefix]]:
    """Weights, the types they are computed in, and their active parts, for the present widths.

    Matrix products (1x1, stride 1) are left out: they take strided views. So are weights that lie
    there as they are needed.
    """
    widths = [unit.width for unit in mutator.units]
    wanted = []
    for layer, spec in mutator.layers_with_specs():
        if type(layer) is not SlimConv2d or layer.groups != 1 or layer.out_segments is not None:
            continue
        if layer.kernel_size == layer.stride == (1, 1):
            continue
        weight = layer.weight
        dtype = autocast_dtype_on(weight.device.type) or weight.dtype
        c_in, segments = active(spec.input_dim, widths, spec.units)
        prefix = Prefix(layer.active_out, c_in, segments)
        if prefix != (*weight.shape[:2], None) or not weight.is_contiguous(memory_format=torch.channels_last):
            wanted.append((weight, dtype, prefix))
    return wanted
