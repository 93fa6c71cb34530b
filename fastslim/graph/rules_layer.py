"""Rules for layers with weights: convolution, linear, normalisation, embedding, attention."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fastslim.graph.known import Dim, Known, Layout, argument, product, shape_of
from fastslim.graph.parts import NotUnderstoodError, Part, Parts, scaled
from fastslim.graph.propagate import Propagation, Rule
from fastslim.nn import SlimLayer


def check_slimmable(module: nn.Module) -> None:
    """Raises NotUnderstoodError when a layer must be left exactly as it is."""
    for name in ("weight", "in_proj_weight"):
        if name in module.__dict__:
            raise NotUnderstoodError("computes its weight in a hook")
    for parameter in module.parameters():
        if not parameter.is_floating_point():
            raise NotUnderstoodError(f"has parameters of type {parameter.dtype}, which no kernel slims")


def _stored(p: Propagation, node: fx.Node, name: str) -> list[Dim]:
    """The axes of a parameter or buffer of the module that is called."""
    tensor = getattr(p.module(node), name)
    return p.stored(tensor, f"{node.meta['module']}.{name}").dims


def _full(dim: Dim, size: int) -> Parts:
    return (Part(None, size),) if dim is None else dim


def _follow(p: Propagation, node: fx.Node, dim: Dim, size: int, names: tuple[str, ...]) -> None:
    """Vectors of the module with one entry per channel change together with the channels."""
    module = p.module(node)
    for name in names:
        tensor = getattr(module, name, None)
        if tensor is not None and tensor.dim() and tensor.shape[0] == size:
            p.tie(_stored(p, node, name)[0], dim, size)


def convolve(
    p: Propagation, x: Dim, weight: list[Dim], channels: tuple[int, int], groups: int, transposed: bool
) -> tuple[Dim, Dim]:
    """Ties a convolution's input and weight; returns the input's channels and the output's.

    Args:
        p: the analysis.
        x: the input's channels.
        weight: axes of the weight, (out, in / groups, ...) or transposed (in, out / groups, ...).
        channels: input and output channels.
        groups: of the convolution.
        transposed: which form the weight has.
    """
    inputs, outputs = channels
    if groups == 1:
        own, out = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
        return p.tie(own, x, inputs), out
    if transposed:
        x = p.tie(weight[0], x, inputs)
        per_group = divided(p, x, inputs // groups)
        # The weight's second axis lies within a group; the output is as many groups of it.
        return x, None if per_group is None else scaled(per_group, outputs // groups)
    of_input, of_output = divided(p, x, inputs // groups), divided(p, weight[0], outputs // groups)
    shared = p.tie(of_input, of_output, groups)
    return p.resolved(x), None if shared is None else scaled(shared, outputs // groups)


def divided(p: Propagation, dim: Dim, divisor: int) -> Dim:
    """A dimension after every `divisor` consecutive entries have become one."""
    return None if dim is None else p.units.divided(dim, divisor)


def conv(p: Propagation, node: fx.Node) -> Known:
    """Convolution modules: a new unit; grouped ones keep whole groups of their input."""
    module: Any = p.module(node)
    check_slimmable(module)
    spatial, transposed = len(module.kernel_size), module.transposed
    dims, shape, out_shape = list(p.dims(node.args[0])), shape_of(node.args[0]), shape_of(node)
    if len(shape) != spatial + 2:
        raise NotUnderstoodError(f"gets a tensor of {len(shape)} dimensions instead of {spatial + 2}")
    positions = [_slide(p, dim, module, i, transposed) for i, dim in enumerate(dims[2:])]
    weight = _stored(p, node, "weight")
    if not (transposed and module.groups > 1):
        p.produce(weight[1 if transposed else 0], str(node.meta["module"]))
    channels = (module.in_channels, module.out_channels)
    x, out = convolve(p, dims[1], weight, channels, module.groups, transposed)
    if module.bias is not None:
        out = p.tie(out, _stored(p, node, "bias")[0], module.out_channels)
    p.layer(
        node,
        "conv_transpose" if transposed else "conv",
        _full(x, channels[0]),
        _full(out, channels[1]),
        # A transposed convolution reads every weight once per input position.
        product(shape[2:] if transposed else out_shape[2:]),
    )
    return Layout((dims[0], out, *positions))


def _slide(p: Propagation, dim: Dim, module: Any, position: int, transposed: bool) -> Dim:
    """Channels as positions, which a convolution slides over (efficient channel attention)."""
    if dim is None:
        return None
    kernel, dilation, stride = (getattr(module, n)[position] for n in ("kernel_size", "dilation", "stride"))
    padding = module.padding if isinstance(module.padding, str) else 2 * module.padding[position]
    same = stride == 1 and padding in ("same", dilation * (kernel - 1)) and not transposed
    if same and module.in_channels == module.out_channels == 1:
        return dim
    p.keep_full(dim, "convolves across the channels")
    return None


def linear(p: Propagation, node: fx.Node) -> Known:
    """A new unit in the last dimension; the others pass."""
    module: Any = p.module(node)
    check_slimmable(module)
    dims, shape = p.dims(node.args[0]), shape_of(node.args[0])
    weight = _stored(p, node, "weight")
    p.produce(weight[0], str(node.meta["module"]))
    x, out = p.tie(weight[1], dims[-1], module.in_features), weight[0]
    if module.bias is not None:
        out = p.tie(out, _stored(p, node, "bias")[0], module.out_features)
    p.layer(node, "linear", _full(x, module.in_features), _full(out, module.out_features), product(shape[1:-1]))
    return Layout((*dims[:-1], out))


def embedding(p: Propagation, node: fx.Node) -> Known:
    """A new unit: the vector's entries."""
    module: Any = p.module(node)
    check_slimmable(module)
    weight = _stored(p, node, "weight")
    if module.max_norm is not None:
        raise NotUnderstoodError("renormalises whole rows (max_norm)")
    p.keep_full(weight[0], "is looked up by index")
    p.produce(weight[1], str(node.meta["module"]))
    entries = (Part(None, module.num_embeddings),)
    p.layer(node, "embedding", entries, _full(weight[1], module.embedding_dim), 0)
    return Layout((*p.dims(node.args[0]), weight[1]))


def _channels(p: Propagation, node: fx.Node, dim: int, kind: str, names: tuple[str, ...]) -> Known:
    """A layer that works on each channel with parameters of its own."""
    module = p.module(node)
    check_slimmable(module)
    dims, size = list(p.dims(node.args[0])), shape_of(node.args[0])[dim]
    _follow(p, node, dims[dim], size, names)
    dims[dim] = p.resolved(dims[dim])
    parts = _full(dims[dim], size)
    p.layer(node, kind, parts, parts, 0)
    return Layout(tuple(dims))


def batch_norm(p: Propagation, node: fx.Node) -> Known:
    """Channels pass; scale, shift and statistics follow them."""
    return _channels(p, node, 1, "bn", ("weight", "bias", "running_mean", "running_var"))


def instance_norm(p: Propagation, node: fx.Node) -> Known:
    """As batch norm, for each sample by itself."""
    ndim = {"InstanceNorm1d": 3, "InstanceNorm2d": 4, "InstanceNorm3d": 5}
    module = p.module(node)
    wanted = next((n for name, n in ndim.items() if name in type(module).__name__), 0)
    if len(shape_of(node.args[0])) != wanted:
        raise NotUnderstoodError("is called without a batch dimension")
    return _channels(p, node, 1, "instance_norm", ("weight", "bias", "running_mean", "running_var"))


def prelu(p: Propagation, node: fx.Node) -> Known:
    """One slope for all, or one per channel."""
    module: Any = p.module(node)
    if module.num_parameters == 1:
        return Layout(p.dims(node.args[0]))
    return _channels(p, node, 1, "prelu", ("weight",))


def group_norm(p: Propagation, node: fx.Node) -> Known:
    """Keeps the size of its groups: widths are whole groups."""
    module: Any = p.module(node)
    dims = p.dims(node.args[0])
    if dims[1] is not None and module.num_groups > 1:
        p.units.divided(dims[1], module.num_channels // module.num_groups)
    return _channels(p, node, 1, "group_norm", ("weight", "bias"))


def layer_norm(p: Propagation, node: fx.Node) -> Known:
    """Statistics over the active entries of the normalised dimensions."""
    module: Any = p.module(node)
    kind = "rms_norm" if isinstance(module, nn.RMSNorm) else "layer_norm"
    first = len(shape_of(node.args[0])) - len(module.normalized_shape)
    dims = p.dims(node.args[0])
    for dim in dims[first + 1 :]:
        p.keep_full(dim, "is normalised in a dimension behind the first one")
    for name in ("weight", "bias"):
        if getattr(module, name, None) is not None:
            for axis in _stored(p, node, name)[1:]:
                p.keep_full(axis, "is normalised in a dimension behind the first one")
    return _channels(p, node, first, kind, ("weight", "bias"))


def multihead_attention(p: Propagation, node: fx.Node) -> Known:
    """`nn.MultiheadAttention`: heads are a unit, the size of a head stays; input and output are units of their own."""
    module: Any = p.module(node)
    check_slimmable(module)
    name = str(node.meta["module"])
    if module.bias_k is not None or module.add_zero_attn:
        raise NotUnderstoodError("adds a bias or zeros to the keys")
    q, k, v = (argument(node, i, n) for i, n in enumerate(("query", "key", "value")))
    embed, head_dim = module.embed_dim, module.head_dim
    if module._qkv_same_embed_dim or getattr(module, "in_proj_weight", None) is not None:
        rows, columns = _stored(p, node, "in_proj_weight")
        p.produce(rows, name)
        blocks: list[Dim] = list(p.units.cut(_full(rows, 3 * embed), [embed, 2 * embed]))
        heads = p.tie_all(blocks, embed)
        for x in (q, k, v):
            columns = p.tie(columns, p.dims(x)[-1], embed)
        sources = [columns] * 3
    else:
        weights = [_stored(p, node, f"{letter}_proj_weight") for letter in "qkv"]
        p.produce(weights[0][0], name)
        heads = p.tie_all([weight[0] for weight in weights], embed)
        sources = [p.tie(w[1], p.dims(x)[-1], shape_of(x)[-1]) for w, x in zip(weights, (q, k, v), strict=True)]
    if heads is not None:
        p.units.divided(heads, head_dim)
    if module.in_proj_bias is not None:
        blocks = list(p.units.cut(_full(_stored(p, node, "in_proj_bias")[0], 3 * embed), [embed, 2 * embed]))
        heads = p.tie_all([heads, *blocks], embed)
    out_weight = p.stored(module.out_proj.weight, f"{name}.out_proj.weight").dims
    p.produce(out_weight[0], f"{name}.out_proj")
    heads = p.tie(heads, out_weight[1], embed)
    out = out_weight[0]
    if module.out_proj.bias is not None:
        out = p.tie(out, p.stored(module.out_proj.bias, f"{name}.out_proj.bias").dims[0], embed)
    if len(p.resolved(_full(heads, embed)) or ()) != 1:
        p.keep_full(heads, "has heads in several parts")
    tokens = product(shape_of(q)[:-1]) // (shape_of(q)[0 if module.batch_first else 1] if len(shape_of(q)) == 3 else 1)
    resolved = [_full(p.resolved(dim), shape_of(x)[-1]) for dim, x in zip(sources, (q, k, v), strict=True)]
    p.attention_layer(node, resolved, _full(out, embed), _full(p.resolved(heads), embed), tokens)
    dims = list(p.dims(q))
    weights_known = None
    return (Layout((*dims[:-1], p.resolved(out))), weights_known)


_KINDS: dict[tuple[type[nn.Module], ...], Rule] = {
    (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d): conv,
    (nn.Linear,): linear,
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d): batch_norm,
    (nn.LayerNorm, nn.RMSNorm): layer_norm,
    (nn.GroupNorm,): group_norm,
    (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d): instance_norm,
    (nn.PReLU,): prelu,
    (nn.Embedding,): embedding,
    (nn.MultiheadAttention,): multihead_attention,
}


def layer_rule(module: nn.Module) -> Rule | None:
    """The rule of a layer with weights: exactly a torch class, or the slim class that has taken its place."""
    plain = type(module)._plain if isinstance(module, SlimLayer) else type(module)
    return next((rule for classes, rule in _KINDS.items() if plain in classes), None)
