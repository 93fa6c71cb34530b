"""The plain form of a narrow multi-head attention."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY

from fastslim.nn.slim import bare_copy


def plain_attention(
    layer: nn.MultiheadAttention,
    weights: list[Tensor],
    biases: list[Tensor | None],
    out_weight: Tensor,
    out_bias: Tensor | None,
) -> nn.Module:
    """A :class:`torch.nn.MultiheadAttention` with these projections, behind a linear layer if need be.

    Torch's class maps a query to as many channels as it has. Where the heads together have another
    number, a linear layer brings the query to it, and the class's own map is the identity.

    Args:
        layer: whose settings and `requires_grad` count.
        weights: ``(inner, channels)`` of query, key and value.
        biases: ``(inner,)`` of query, key and value, or None.
        out_weight: ``(out, inner)``.
        out_bias: ``(out,)`` or None.
    """
    (inner, query), key, value = weights[0].shape, weights[1].shape[1], weights[2].shape[1]
    # Only the packed form lets torch's fast paths, which expect square projections, be taken.
    packed = inner == query == key == value == out_weight.shape[0]
    sources = {name: p for name, p in layer.named_parameters(recurse=False) if name.endswith("weight")}
    trains = [p.requires_grad for p in sources.values()] * (3 // len(sources))
    attention = bare_copy(layer, nn.MultiheadAttention, without=layer._width_state)
    attention.__dict__.update(embed_dim=inner, num_heads=inner // layer.head_dim, kdim=key, vdim=value)
    attention.__dict__["_qkv_same_embed_dim"] = packed
    projections = dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), weights, strict=True))
    attention.register_parameter("in_proj_weight", _parameter(torch.cat(weights), trains[0]) if packed else None)
    for (name, weight), train in zip(projections.items(), trains, strict=True):
        if name == "q_proj_weight" and query != inner:
            identity = torch.eye(inner, dtype=weight.dtype, device=weight.device)
            attention.register_buffer(name, identity, persistent=False)
        else:
            attention.register_parameter(name, None if packed else _parameter(weight, train))
    bias = None if biases[0] is None else _parameter(torch.cat(biases), layer.in_proj_bias.requires_grad)
    attention.register_parameter("in_proj_bias", bias)
    attention.out_proj = _out_projection(layer.out_proj, out_weight, out_bias)
    if query == inner:
        return attention
    q_proj = nn.Linear(query, inner, bias=False, device="meta").train(layer.training)
    q_proj.weight = _parameter(weights[0], trains[0])
    return _behind(q_proj, attention)


def _parameter(value: Tensor, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad)


def _out_projection(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Module:
    plain = bare_copy(layer, type(layer))
    plain.__dict__.update(in_features=weight.shape[1], out_features=weight.shape[0])
    plain.weight = _parameter(weight, layer.weight.requires_grad)
    plain.register_parameter("bias", None if bias is None else _parameter(bias, layer.bias.requires_grad))
    return plain


def _behind(q_proj: nn.Linear, attention: nn.MultiheadAttention) -> fx.GraphModule:
    """``attention(q_proj(query), ...)``, called as an attention and with the attributes encoder layers read."""
    graph = fx.Graph()
    query, key, value = (graph.placeholder(name) for name in ("query", "key", "value"))
    options = [
        graph.placeholder(name, default_value=default)
        for name, default in (
            ("key_padding_mask", None),
            ("need_weights", True),
            ("attn_mask", None),
            ("average_attn_weights", True),
            ("is_causal", False),
        )
    ]
    inner = graph.call_module("q_proj", (query,))
    graph.output(graph.call_module("attention", (inner, key, value, *options)))
    module = fx.GraphModule({"q_proj": q_proj, "attention": attention}, graph, "MultiheadAttention")
    seen = dict(
        embed_dim=q_proj.in_features,
        num_heads=attention.num_heads,
        head_dim=attention.head_dim,
        batch_first=attention.batch_first,
        _qkv_same_embed_dim=False,
        in_proj_bias=None,
        in_proj_weight=None,
    )
    for name, value_seen in seen.items():
        setattr(module, name, value_seen)
    module.meta[_USER_PRESERVED_ATTRIBUTES_KEY] = seen
    module.training = attention.training
    return module
