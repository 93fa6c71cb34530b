"""Attention between two inputs, over pixels and over channels."""

import torch
import torch.nn.functional as F
from torch import nn

from .architecture import architecture, blocks, image
from .attention import HEAD, TOKENS
from .cnn import IMAGE


def tokens_and_context(batch):
    return TOKENS(batch) + image(7, 3)(batch)


@architecture(
    tokens_and_context,
    {"dim": "embed.weight:0", "context": "embed2.weight:0", "heads": "out.weight:1/4"},
)
class CrossAttention(nn.Module):
    """Queries from one input, keys and values from another."""

    def __init__(self, dim=16, context=12, heads=4):
        super().__init__()
        self.heads, inner = heads, heads * HEAD
        self.embed, self.embed2 = nn.Linear(6, dim), nn.Linear(3, context)
        self.q, self.k, self.v = nn.Linear(dim, inner), nn.Linear(context, inner), nn.Linear(context, inner)
        self.out, self.head = nn.Linear(inner, dim), nn.Linear(dim, 10)

    def forward(self, x, context):
        x, context = self.embed(x), F.gelu(self.embed2(context))
        q, k, v = (
            layer(t).unflatten(-1, (self.heads, HEAD)).transpose(1, 2)
            for layer, t in ((self.q, x), (self.k, context), (self.v, context))
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.head((x + self.out(y.transpose(1, 2).flatten(2))).mean(1))


@architecture(image(3, 8, 8), {"stem": "stem.weight:0", "inner": "query.weight:0", "value": "value.weight:0"})
class NonLocal(nn.Module):
    """Attention over pixels: the product runs over channels."""

    def __init__(self, stem=16, inner=8, value=12):
        super().__init__()
        self.stem, self.query, self.key = (
            nn.Conv2d(3, stem, 3, 2, 1),
            nn.Conv2d(stem, inner, 1),
            nn.Conv2d(stem, inner, 1),
        )
        self.value, self.out, self.gamma = (
            nn.Conv2d(stem, value, 1),
            nn.Conv2d(value, stem, 1),
            nn.Parameter(torch.ones(1)),
        )
        self.head = nn.Linear(stem, 10)

    def forward(self, x):
        x = self.stem(x)
        b, _, h, w = x.size()
        q = self.query(x).view(b, -1, h * w).permute(0, 2, 1)
        energy = torch.bmm(q, self.key(x).view(b, -1, h * w)).softmax(dim=-1)
        y = torch.bmm(self.value(x).view(b, -1, h * w), energy.permute(0, 2, 1))
        x = x + self.gamma * self.out(y.view(b, -1, h, w))
        return self.head(x.mean((2, 3)))


@architecture(
    IMAGE, {"dim": "embed.weight:0", "heads": "proj.weight:1/4"}, {"qkv.*:0": blocks(3), "depth.*:0": blocks(3)}
)
class ChannelAttention(nn.Module):
    """Restormer: channels attend to each other within a head; the map is (head channels)^2."""

    def __init__(self, dim=16, heads=4):
        super().__init__()
        inner = heads * HEAD
        self.heads, self.embed = heads, nn.Conv2d(3, dim, 3, 2, 1)
        self.qkv, self.depth = nn.Conv2d(dim, 3 * inner, 1), nn.Conv2d(3 * inner, 3 * inner, 3, 1, 1, groups=3 * inner)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.proj, self.head = nn.Conv2d(inner, dim, 1), nn.Linear(dim, 10)

    def forward(self, x):
        x = self.embed(x)
        b, _, h, w = x.shape
        q, k, v = (t.reshape(b, self.heads, HEAD, h * w) for t in self.depth(self.qkv(x)).chunk(3, dim=1))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        y = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(dim=-1) @ v
        return self.head((x + self.proj(y.reshape(b, self.heads * HEAD, h, w))).mean((2, 3)))
