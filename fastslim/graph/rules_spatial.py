"""Rules for operations on channels and images: shuffles, pooling, padding, patches."""

from __future__ import annotations

import math
from typing import Any

from torch import fx, nn

from fastslim.graph.known import Known, Layout, Size, argument, is_tensor, number, shape_of
from fastslim.graph.parts import NotUnderstoodError, Part, scaled, total
from fastslim.graph.propagate import Propagation, Rule
from fastslim.graph.rules_reshape import in_groups, one_dim, shuffled


def _setting(p: Propagation, node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An attribute of the module that is called, or an argument of the function."""
    return getattr(p.module(node), name) if node.op == "call_module" else argument(node, position, name, default)


def channel_shuffle(p: Propagation, node: fx.Node) -> Known:
    """The groups' channels in turn: equal shares of the groups stay together."""
    groups = _setting(p, node, 1, "groups")
    dims = list(p.dims(node.args[0]))
    if dims[1] is not None:
        if in_groups(p, dims[1]):
            inner = p.units.divided(dims[1], groups)
        else:
            inner = one_dim(p, dims[1], groups, total(dims[1]) // groups, 1)
        dims[1] = shuffled(p, inner, groups)
    return Layout(tuple(dims))


def glu(p: Propagation, node: fx.Node) -> Known:
    """``a * sigmoid(b)`` of the two halves."""
    dim = _setting(p, node, 1, "dim", -1)
    dims = list(p.dims(node.args[0]))
    parts = dims[dim]
    if parts is not None:
        dims[dim] = one_dim(p, parts, 2, math.ceil(total(parts) / 2), 1)
    return Layout(tuple(dims))


def pixel_shuffle(p: Propagation, node: fx.Node) -> Known:
    """R * r channels become r x r pixels of one."""
    factor = _setting(p, node, 1, "upscale_factor")
    dims = list(p.dims(node.args[0]))
    if dims[-3] is not None:
        dims[-3] = p.units.divided(dims[-3], factor * factor)
    return Layout(tuple(dims))


def pixel_unshuffle(p: Propagation, node: fx.Node) -> Known:
    """R x r pixels become r * r channels."""
    factor = _setting(p, node, 1, "downscale_factor")
    dims = list(p.dims(node.args[0]))
    if dims[-3] is not None:
        dims[-3] = scaled(dims[-3], factor * factor)
    return Layout(tuple(dims))


def pooling(spatial: int) -> Rule:
    """Works inside each channel on the last `spatial` dimensions, which stay full."""

    def rule(p: Propagation, node: fx.Node) -> Known:
        x = node.args[0] if node.args else node.kwargs["input"]
        for other in node.all_input_nodes:
            if other is not x and is_tensor(other):  # sampling points, indices to unpool
                for dim in p.dims(other):
                    p.keep_full(dim, "says where to read")
        count = spatial or len(shape_of(x)) - 2
        dims = list(p.dims(x))
        for d in range(len(dims) - count, len(dims)):
            p.keep_full(dims[d], "works across the channels")
            dims[d] = None
        layout = Layout(tuple(dims))
        return layout if is_tensor(node) else (layout, layout)

    return rule


def pad(p: Propagation, node: fx.Node) -> Known:
    """Padding: a dimension that grows stays full."""
    x = node.args[0] if node.args else node.kwargs["input"]
    dims = list(p.dims(x))
    for d, (before, after) in enumerate(zip(shape_of(x), shape_of(node), strict=True)):
        if before == after:
            continue
        amounts: Any = argument(node, 1, "pad")
        if any(isinstance(n, fx.Node) and isinstance(p.known.get(n), Size) for n in amounts):
            raise NotUnderstoodError("pads by a number of channels")
        if dims[d] is None:
            continue
        place = 2 * (len(dims) - 1 - d)
        left, right = (number(n) for n in amounts[place : place + 2])
        mode = argument(node, 2, "mode", "constant")
        if mode != "constant" or left < 0 or right < 0:
            p.keep_full(dims[d], "pads or crops the channels")
            dims[d] = None
            continue
        sides = [(Part(None, n),) if n else () for n in (left, right)]
        dims[d] = (*sides[0], *(dims[d] or ()), *sides[1])
    return Layout(tuple(dims))


def unfold(p: Propagation, node: fx.Node) -> Known:
    """``F.unfold``: (N, C, H, W) -> (N, C * kernel, L)."""
    if len(shape_of(node)) != 3:
        raise NotUnderstoodError("unfolds without a batch dimension, or along one dimension")
    channels, rows = shape_of(node.args[0])[1], shape_of(node)[1]
    dims = p.dims(node.args[0])
    return Layout((dims[0], None if dims[1] is None else scaled(dims[1], rows // channels), None))


def tensor_unfold(p: Propagation, node: fx.Node) -> Known:
    """``x.unfold(dim, size, step)``: windows along one dimension, in a new last one."""
    dims = list(p.dims(node.args[0]))
    dim = argument(node, 1, "dimension")
    p.keep_full(dims[dim], "takes windows of the channels")
    dims[dim] = None
    return Layout((*dims, None))


def fold(p: Propagation, node: fx.Node) -> Known:
    """``F.fold``: (N, C * kernel, L) -> (N, C, H, W)."""
    if len(shape_of(node)) != 4:
        raise NotUnderstoodError("folds without a batch dimension")
    rows, channels = shape_of(node.args[0])[1], shape_of(node)[1]
    dims = p.dims(node.args[0])
    return Layout((dims[0], None if dims[1] is None else p.units.divided(dims[1], rows // channels), None, None))


def view_dims(p: Propagation, node: fx.Node) -> Known:
    """Reinterprets the last dimension (complex numbers): that one stays full."""
    dims = list(p.dims(node.args[0]))
    if dims:
        p.keep_full(dims[-1], "reads pairs of channels as complex numbers")
    out = len(shape_of(node))
    return Layout((*dims[: out - 1], None) if out <= len(dims) else (*dims[:-1], None, None))


_POOLS = (
    "max_pool{} avg_pool{} adaptive_avg_pool{} adaptive_max_pool{} lp_pool{} max_unpool{} max_pool{}_with_indices "
    "adaptive_max_pool{}_with_indices fractional_max_pool{}"
).split()
NAMED: dict[str, Rule] = {
    **{pool.format(f"{n}d"): pooling(n) for pool in _POOLS for n in (1, 2, 3)},
    **dict.fromkeys(("interpolate", "upsample", "upsample_bilinear", "upsample_nearest", "grid_sample"), pooling(0)),
    "channel_shuffle": channel_shuffle,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "pad": pad,
    "unfold": unfold,
    "fold": fold,
    **dict.fromkeys(("view_as_real", "view_as_complex", "rfft", "irfft", "fft"), view_dims),
    "glu": glu,
}
MODULES: dict[type[nn.Module], Rule] = {
    nn.PixelShuffle: pixel_shuffle,
    nn.PixelUnshuffle: pixel_unshuffle,
    nn.ChannelShuffle: channel_shuffle,
    nn.Unfold: unfold,
    nn.Fold: fold,
    nn.GLU: glu,
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), pooling(0)),
}
