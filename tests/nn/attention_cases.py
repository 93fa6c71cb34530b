"""An attention with four heads of four channels, its inputs and masks, and plain attentions of fewer heads."""

from __future__ import annotations

import torch
from layer_cases import randomised
from torch import Tensor, nn

from fastslim.nn import SlimMultiheadAttention

TIGHT = dict(rtol=1e-12, atol=1e-12)
HEADS, SIZE, BATCH, LENGTH, SOURCE = 4, 4, 3, 5, 6
FULL = HEADS * SIZE


def attention(cls: type = SlimMultiheadAttention, embed: int = FULL, heads: int = HEADS, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return randomised(cls(embed, heads, **kwargs).double())


def inputs(channels: tuple[int, int, int], batch_first=True, alone=False) -> list[Tensor]:
    torch.manual_seed(1)
    tensors = []
    for length, count in zip((LENGTH, SOURCE, SOURCE), channels, strict=True):
        shape = (length, count) if alone else (BATCH, length, count) if batch_first else (length, BATCH, count)
        tensors.append(torch.randn(shape, dtype=torch.float64, requires_grad=True))
    return tensors


def small(slim: SlimMultiheadAttention, heads: int, cuts: list[list[int]], rows: list[int], **kwargs) -> nn.Module:
    """A plain attention of few heads; `cuts` are the channels of query, key and value."""
    inner = heads * SIZE
    assert inner == len(cuts[0]) == len(rows)
    plain = attention(nn.MultiheadAttention, inner, heads, kdim=len(cuts[1]), vdim=len(cuts[2]), **kwargs)
    theirs = slim.state_dict()
    if "in_proj_weight" in theirs:
        weights = theirs["in_proj_weight"].chunk(3)
    else:
        weights = [theirs[f"{name}_proj_weight"] for name in "qkv"]
    with torch.no_grad():
        parts = [weight[:inner, cut] for weight, cut in zip(weights, cuts, strict=True)]
        if plain.in_proj_weight is not None:
            plain.in_proj_weight.copy_(torch.cat(parts))
        else:
            for name, part in zip("qkv", parts, strict=True):
                plain.get_parameter(f"{name}_proj_weight").copy_(part)
        plain.out_proj.weight.copy_(theirs["out_proj.weight"][rows, :inner])
        if plain.in_proj_bias is not None:
            plain.in_proj_bias.copy_(torch.cat([b[:inner] for b in theirs["in_proj_bias"].chunk(3)]))
            plain.out_proj.bias.copy_(theirs["out_proj.bias"][rows])
    return plain.train(slim.training)


def same(mine: tuple, theirs: tuple, sources: list[Tensor]) -> None:
    torch.testing.assert_close(mine[0], theirs[0], **TIGHT)
    assert (mine[1] is None) == (theirs[1] is None)
    if mine[1] is not None:
        torch.testing.assert_close(mine[1], theirs[1], **TIGHT)
    if mine[0].requires_grad:
        upstream = torch.randn_like(mine[0])
        pairs = (torch.autograd.grad(y[0], sources, upstream, retain_graph=True) for y in (mine, theirs))
        for own, other in zip(*pairs, strict=True):
            torch.testing.assert_close(own, other, **TIGHT)


def masks(kind: str, heads: int) -> dict:
    torch.manual_seed(2)
    hidden = torch.rand(LENGTH, SOURCE) < 0.3
    hidden[:, 0] = False
    padding = torch.zeros(BATCH, SOURCE, dtype=torch.bool)
    padding[1, 3:] = True
    causal = torch.ones(LENGTH, SOURCE, dtype=torch.bool).triu(1)
    per_head = torch.randn(BATCH, HEADS, LENGTH, SOURCE, dtype=torch.float64)[:, :heads].flatten(0, 1)
    return {
        "padding": dict(key_padding_mask=padding),
        "attention": dict(attn_mask=hidden),
        "both": dict(attn_mask=hidden, key_padding_mask=padding),
        "numbers": dict(attn_mask=torch.randn(LENGTH, SOURCE, dtype=torch.float64)),
        "per-head": dict(attn_mask=per_head),
        "per-head-and-padding": dict(attn_mask=per_head > 2, key_padding_mask=padding),
        "causal": dict(attn_mask=causal, is_causal=True),
        "causal-and-padding": dict(attn_mask=causal, is_causal=True, key_padding_mask=padding),
    }[kind]
