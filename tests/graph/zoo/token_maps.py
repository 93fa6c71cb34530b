"""Transformers that mix tokens and maps: spatial reduction, unfolded patches, learned queries, heads that talk."""

import torch
import torch.nn.functional as F
from torch import nn

from .architecture import architecture, blocks, image, side
from .attention import HEAD, TOKENS
from .cnn import IMAGE


@architecture(
    IMAGE,
    {"dim": "patch.weight:0", "heads": "proj.weight:1/4", "reduced": "sr.weight:0", "hidden": "fc1.weight:0"},
    {"kv.*:0": blocks(2)},
)
class SpatialReduction(nn.Module):
    """PVT: keys and values from a smaller map; a depthwise convolution between the MLP's layers."""

    def __init__(self, dim=16, heads=4, reduced=16, hidden=24):
        super().__init__()
        self.num_heads, inner = heads, heads * HEAD
        self.patch, self.sr, self.norm = nn.Conv2d(3, dim, 4, 4), nn.Conv2d(dim, reduced, 2, 2), nn.LayerNorm(reduced)
        self.q, self.kv, self.proj = nn.Linear(dim, inner), nn.Linear(reduced, 2 * inner), nn.Linear(inner, dim)
        self.fc1, self.dw = nn.Linear(dim, hidden), nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)
        self.fc2, self.head = nn.Linear(hidden, dim), nn.Linear(dim, 10)

    def attend(self, x, H, W):
        B, N, C = x.shape
        q = self.q(x).reshape(B, N, self.num_heads, HEAD).permute(0, 2, 1, 3)
        y = x.permute(0, 2, 1).reshape(B, C, H, W)
        y = self.norm(self.sr(y).flatten(2).permute(0, 2, 1))
        kv = self.kv(y).reshape(B, -1, 2, self.num_heads, HEAD).permute(2, 0, 3, 1, 4)
        k, v = kv[0], kv[1]
        attn = (q @ k.transpose(-2, -1) * HEAD**-0.5).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, -1))

    def mlp(self, x, H, W):
        B, N, C = x.shape
        y = self.fc1(x)
        y = self.dw(y.transpose(1, 2).view(B, -1, H, W)).flatten(2).transpose(1, 2)
        return self.fc2(F.gelu(y))

    def forward(self, x):
        x = self.patch(x)
        _, _, H, W = x.shape
        x = x.flatten(2).transpose(1, 2)
        x = x + self.attend(x, H, W)
        return self.head((x + self.mlp(x, H, W)).mean(1))


@architecture(
    image(3, 8, 8),
    {
        "stem": "stem.weight:0",
        "dim": "expand.weight:0",
        "heads": "out.weight:1/4",
        "back": "back.weight:0",
        "out": "fuse.weight:0",
    },
    {"qkv.*:0": blocks(3), "fuse.weight:1": side("stem", "back")},
    units=0,
)
class UnfoldedPatches(nn.Module):
    """MobileViT: pixels at the same place of every patch attend to each other; the map is folded back."""

    def __init__(self, stem=12, dim=16, heads=4, back=12, out=12):
        super().__init__()
        self.num_heads = heads
        self.stem, self.expand = nn.Conv2d(3, stem, 3, padding=1), nn.Conv2d(stem, dim, 1, bias=False)
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(dim),
            nn.Linear(dim, 3 * heads * HEAD),
            nn.Linear(heads * HEAD, dim),
        )
        self.back, self.fuse = nn.Conv2d(dim, back, 1), nn.Conv2d(stem + back, out, 3, padding=1)
        self.head = nn.Linear(out, 10)

    def attend(self, x):
        B, N, _ = x.shape
        q, k, v = (t.unflatten(2, (self.num_heads, HEAD)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, self.num_heads * HEAD))

    def forward(self, x):
        x = self.stem(x)
        y = self.expand(x)
        B, C, H, W = y.shape
        rows, columns = H // 2, W // 2
        y = y.reshape(B * C * rows, 2, columns, 2).transpose(1, 2)
        y = y.reshape(B, C, rows * columns, 4).transpose(1, 3).reshape(B * 4, rows * columns, -1)
        y = y + self.attend(self.norm(y))
        y = y.contiguous().view(B, 4, rows * columns, -1).transpose(1, 3)
        y = y.reshape(B * C * rows, columns, 2, 2).transpose(1, 2).reshape(B, C, rows * 2, columns * 2)
        return self.head(self.fuse(torch.cat((x, self.back(y)), dim=1)).mean((2, 3)))


@architecture(
    TOKENS, {"dim": "embed.weight:0", "heads": "mix1.weight:1", "mixed": "mix1.weight:0"}, {"qkv.*:0": blocks(3)}
)
class TalkingHeads(nn.Module):
    """CaiT: linear layers over the heads, before and after the softmax."""

    def __init__(self, dim=16, heads=4, mixed=4):
        super().__init__()
        self.num_heads, inner = heads, heads * HEAD
        self.embed, self.qkv, self.proj = nn.Linear(6, dim), nn.Linear(dim, 3 * inner), nn.Linear(inner, dim)
        self.mix1, self.mix2, self.head = nn.Linear(heads, mixed), nn.Linear(mixed, heads), nn.Linear(dim, 10)

    def forward(self, x):
        x = self.embed(x)
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
        attn = q @ k.transpose(-2, -1)
        attn = self.mix1(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(dim=-1)
        attn = self.mix2(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head((x + self.proj((attn @ v).transpose(1, 2).reshape(B, N, -1))).mean(1))


@architecture(TOKENS, {"dim": "embed.weight:0", "heads": "bias.weight:1", "hidden": "wi_0.weight:0"})
class BucketBias(nn.Module):
    """T5: a position bias looked up for each head, gated GELU, norms without bias."""

    def __init__(self, dim=16, heads=4, hidden=24):
        super().__init__()
        self.n_heads, self.key_value_proj_dim, self.inner_dim = heads, HEAD, heads * HEAD
        self.embed, self.bias = nn.Linear(6, dim), nn.Embedding(8, heads)
        self.q, self.k, self.v = (nn.Linear(dim, heads * HEAD, bias=False) for _ in range(3))
        self.o, self.norm, self.head = nn.Linear(heads * HEAD, dim, bias=False), nn.RMSNorm(dim), nn.Linear(dim, 10)
        self.wi_0, self.wi_1 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.wo = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        x = self.embed(x)
        y = self.norm(x)
        batch, length = y.shape[:2]

        def shape(states):
            return states.view(batch, -1, self.n_heads, self.key_value_proj_dim).transpose(1, 2)

        scores = torch.matmul(shape(self.q(y)), shape(self.k(y)).transpose(3, 2))
        distance = (torch.arange(length)[None, :] - torch.arange(length)[:, None]).abs().clamp(max=7)
        scores += self.bias(distance).permute([2, 0, 1]).unsqueeze(0)
        y = torch.matmul(F.softmax(scores, dim=-1).type_as(scores), shape(self.v(y)))
        x = x + self.o(y.transpose(1, 2).contiguous().view(batch, -1, self.inner_dim))
        return self.head((x + self.wo(F.gelu(self.wi_0(x)) * self.wi_1(x))).mean(1))


@architecture(
    TOKENS,
    {"dim": "embed.weight:0", "latent": "latents:1", "heads": "attn.out_proj.weight:1/4"},
    {"attn.in_proj_bias:0": blocks(3), "head.weight:1": blocks(3)},
    units=0,
)
class LearnedQueries(nn.Module):
    """Perceiver: a few learned vectors ask the tokens, through nn.MultiheadAttention with sizes of its own."""

    def __init__(self, dim=12, latent=16, heads=4):
        super().__init__()
        self.embed, self.latents = nn.Linear(6, dim), nn.Parameter(torch.randn(3, latent))
        full = (dim, latent, heads) == (12, 16, 4)
        kind = nn.MultiheadAttention if full else PlainCrossAttention
        self.attn = kind(latent, heads, kdim=dim, vdim=dim, batch_first=True)
        self.norm, self.head = nn.LayerNorm(latent), nn.Linear(3 * latent, 10)

    def forward(self, x):
        x = F.gelu(self.embed(x))
        queries = self.latents.unsqueeze(0).repeat(x.shape[0], 1, 1)
        y = self.norm(queries + self.attn(queries, x, x)[0])
        return self.head(y.flatten(1))


class PlainCrossAttention(nn.Module):
    """nn.MultiheadAttention with separate weights, for any number of heads."""

    def __init__(self, dim, heads, kdim, vdim, batch_first):
        super().__init__()
        self.heads, inner = heads, heads * HEAD
        self.q_proj_weight = nn.Parameter(torch.empty(inner, dim))
        self.k_proj_weight, self.v_proj_weight = (
            nn.Parameter(torch.empty(inner, kdim)),
            nn.Parameter(torch.empty(inner, vdim)),
        )
        self.in_proj_bias, self.out_proj = nn.Parameter(torch.empty(3 * inner)), nn.Linear(inner, dim)

    def forward(self, query, key, value):
        weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (self.heads, HEAD)).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, self.in_proj_bias.chunk(3), strict=True)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None
