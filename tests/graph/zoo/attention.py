"""Attention in its many spellings; heads are the unit, and the size of a head stays."""

import torch
import torch.nn.functional as F
from torch import nn

from .architecture import architecture, blocks, image

TOKENS = image(5, 6)
HEAD = 4


class PlainAttention(nn.Module):
    """What `nn.MultiheadAttention` computes, for any number of heads beside any embedding size."""

    _qkv_same_embed_dim = False  # the encoder layer's fused path asks

    def __init__(self, dim, heads, **factory):
        super().__init__()
        self.heads, self.batch_first = heads, True
        self.in_proj_weight = nn.Parameter(torch.empty(3 * heads * HEAD, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * heads * HEAD))
        self.out_proj = nn.Linear(heads * HEAD, dim)

    def forward(self, query, key, value, attn_mask=None, is_causal=False, need_weights=True, key_padding_mask=None):
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (self.heads, HEAD)).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        scores = q @ k.transpose(-2, -1) / HEAD**0.5
        if key_padding_mask is not None:
            scores = scores.masked_fill(key_padding_mask[:, None, None, :], float("-inf"))
        if attn_mask is not None:
            scores = scores + attn_mask
        scores = scores.softmax(-1)
        out = self.out_proj((scores @ v).transpose(1, 2).flatten(2))
        return out, scores.mean(1) if need_weights else None


class Around(nn.Module):
    """Embedding, attention with a residual, mean, classes."""

    attention: type[nn.Module]

    def __init__(self, dim=16, heads=4):
        super().__init__()
        self.embed, self.attn, self.head = nn.Linear(6, dim), self.attention(dim, heads), nn.Linear(dim, 10)

    def forward(self, x):
        x = self.embed(x)
        return self.head((x + self.attn(x)).mean(dim=1))


class _Multihead(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        full = dim == 16 and heads == 4
        self.attn = (
            nn.MultiheadAttention(dim, heads, dropout=0.1, batch_first=True) if full else PlainAttention(dim, heads)
        )

    def forward(self, x):
        y, weights = self.attn(x, x, x, need_weights=False)
        assert weights is None
        return y


@architecture(
    TOKENS,
    {"dim": "embed.weight:0", "heads": "attn.attn.out_proj.weight:1/4"},
    {"attn.attn.in_proj_*:0": blocks(3)},
    units=0,
)
class Multihead(Around):
    """nn.MultiheadAttention."""

    attention = _Multihead


class _FusedQKV(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, HEAD, HEAD**-0.5
        self.qkv, self.attn_drop = nn.Linear(dim, heads * HEAD * 3, bias=True), nn.Dropout(0.1)
        self.proj, self.proj_drop = nn.Linear(heads * HEAD, dim), nn.Dropout(0.1)

    def heads_of(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = self.attn_drop(((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1))
        return attn @ v

    def forward(self, x):
        B, N, C = x.shape
        x = self.heads_of(x).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))

    def narrow_forward(self, x):
        return self.proj_drop(self.proj(self.heads_of(x).transpose(1, 2).flatten(2)))


@architecture(TOKENS, {"dim": "embed.weight:0", "heads": "attn.proj.weight:1/4"}, {"attn.qkv.*:0": blocks(3)})
class FusedQKV(Around):
    """One linear layer for queries, keys and values, as in timm."""

    attention = _FusedQKV


class _Separate(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, inner = heads, heads * HEAD
        self.q, self.k, self.v = nn.Linear(dim, inner), nn.Linear(dim, inner), nn.Linear(dim, inner, bias=False)
        self.out = nn.Linear(inner, dim)

    def forward(self, x):
        B, N, C = x.shape
        H = self.heads
        q = self.q(x).view(B, N, H, C // H).transpose(1, 2)
        k = self.k(x).view(B, N, H, C // H).transpose(1, 2)
        v = self.v(x).view(B, N, H, C // H).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).contiguous().view(B, N, C))

    def narrow_forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (self.heads, HEAD)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@architecture(TOKENS, {"dim": "embed.weight:0", "heads": "attn.out.weight:1/4"})
class SeparateQKV(Around):
    """Three layers, and a head size computed from the input's."""

    attention = _Separate


class _Bert(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = heads, HEAD, heads * HEAD
        self.query, self.key = nn.Linear(dim, self.all_head_size), nn.Linear(dim, self.all_head_size)
        self.value, self.dense = nn.Linear(dim, self.all_head_size), nn.Linear(self.all_head_size, dim)

    def transpose_for_scores(self, x):
        return x.view(x.size()[:-1] + (self.num_attention_heads, self.attention_head_size)).permute(0, 2, 1, 3)

    def forward(self, x):
        q, k, v = (self.transpose_for_scores(layer(x)) for layer in (self.query, self.key, self.value))
        scores = torch.matmul(q, k.transpose(-1, -2)) / self.attention_head_size**0.5
        context = torch.matmul(nn.functional.softmax(scores, dim=-1), v).permute(0, 2, 1, 3).contiguous()
        return self.dense(context.view(context.size()[:-2] + (self.all_head_size,)))


@architecture(TOKENS, {"dim": "embed.weight:0", "heads": "attn.dense.weight:1/4"})
class BertAttention(Around):
    """Sizes concatenated from a shape and numbers."""

    attention = _Bert


class _Merged(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, inner = heads, heads * HEAD
        self.q, self.kv, self.out = nn.Linear(dim, inner), nn.Linear(dim, 2 * inner), nn.Linear(inner, dim)

    def forward(self, x):
        B, N, _ = x.shape
        k, v = self.kv(x).chunk(2, dim=-1)

        def split(t):
            return t.reshape(B, N, self.heads, HEAD).transpose(1, 2).reshape(B * self.heads, N, HEAD)

        q, k, v = split(self.q(x)), split(k), split(v)
        attn = torch.bmm(q, k.transpose(1, 2)).mul(HEAD**-0.5).softmax(-1)
        y = torch.bmm(attn, v).view(B, self.heads, N, HEAD).transpose(1, 2)
        return self.out(y.reshape(B, N, self.heads * HEAD))


@architecture(TOKENS, {"dim": "embed.weight:0", "heads": "attn.out.weight:1/4"}, {"attn.kv.*:0": blocks(2)})
class MergedHeads(Around):
    """Batch and heads in one dimension, bmm, keys and values from one layer."""

    attention = _Merged


class _Einsum(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, inner = heads, heads * HEAD
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * inner, bias=False), nn.Linear(inner, dim)
        self.q_norm, self.k_norm = nn.LayerNorm(HEAD), nn.LayerNorm(HEAD)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, self.heads, HEAD) for t in self.to_qkv(x).chunk(3, dim=-1))
        scores = torch.einsum("bihd,bjhd->bhij", self.q_norm(q), self.k_norm(k)) * self.temperature
        out = torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), v)
        return self.to_out(out.reshape(b, n, -1))


@architecture(TOKENS, {"dim": "embed.weight:0", "heads": "attn.temperature:0"}, {"attn.to_qkv.*:0": blocks(3)})
class EinsumAttention(Around):
    """einsum, normalised queries and keys, a learned temperature for each head."""

    attention = _Einsum


class _GroupedQuery(nn.Module):
    def __init__(self, dim, kv_heads):
        super().__init__()
        self.kv_heads, self.groups = kv_heads, 2
        self.heads = kv_heads * self.groups
        self.q, self.k = nn.Linear(dim, self.heads * HEAD), nn.Linear(dim, kv_heads * HEAD)
        self.v, self.out = nn.Linear(dim, kv_heads * HEAD), nn.Linear(self.heads * HEAD, dim)

    def repeat_kv(self, x):
        b, h, n, d = x.shape
        return x[:, :, None, :, :].expand(b, h, self.groups, n, d).reshape(b, h * self.groups, n, d)

    def forward(self, x):
        shape = (*x.shape[:-1], -1, HEAD)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, self.repeat_kv(k), self.repeat_kv(v), is_causal=True)
        return self.out(y.transpose(1, 2).reshape(*x.shape[:-1], -1))


@architecture(TOKENS, {"dim": "embed.weight:0", "heads": "attn.k.weight:0/4"})
class GroupedQueryAttention(Around):
    """Two query heads share each key and value head."""

    attention = _GroupedQuery
