"""Transformers: torch's own layers, vision transformers, mixers."""

import torch
from torch import nn

from .architecture import architecture, blocks, image
from .attention import PlainAttention, _FusedQKV
from .cnn import IMAGE


def tokens(length, vocabulary=11):
    return lambda batch: (torch.randint(0, vocabulary, (batch, length)),)


@architecture(
    image(5, 6),
    {
        "dim": "embed.weight:0",
        "h0": "encoder.layers.0.self_attn.out_proj.weight:1/4",
        "f0": "encoder.layers.0.linear1.weight:0",
        "h1": "encoder.layers.1.self_attn.out_proj.weight:1/4",
        "f1": "encoder.layers.1.linear1.weight:0",
    },
    {"*.in_proj_*:0": blocks(3)},
    units=0,
)
class Encoder(nn.Module):
    """nn.TransformerEncoder, two layers with a final norm."""

    def __init__(self, dim=16, h0=4, f0=24, h1=4, f1=24):
        super().__init__()
        self.embed = nn.Linear(6, dim)
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(dim))
        self.head = nn.Linear(dim, 10)
        if (dim, h0, f0, h1, f1) != (16, 4, 24, 4, 24):
            for layer, heads, hidden in zip(self.encoder.layers, (h0, h1), (f0, f1), strict=True):
                layer.self_attn = PlainAttention(dim, heads)
                layer.linear1, layer.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
                layer.norm1, layer.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)).mean(1))


def source_and_target(batch):
    return tokens(6)(batch) + tokens(4)(batch)


@architecture(
    source_and_target,
    {
        "dim": "embed.weight:1",
        "e": "encoder.self_attn.out_proj.weight:1/4",
        "s": "decoder.self_attn.out_proj.weight:1/4",
        "c": "decoder.multihead_attn.out_proj.weight:1/4",
        "fe": "encoder.linear1.weight:0",
        "fd": "decoder.linear1.weight:0",
    },
    {"*.in_proj_*:0": blocks(3)},
    units=0,
    classifies=False,
)
class Translator(nn.Module):
    """nn.TransformerEncoderLayer and DecoderLayer: causal mask, cross attention, norm first."""

    def __init__(self, dim=16, e=4, s=4, c=4, fe=24, fd=24):
        super().__init__()
        self.embed, self.position = nn.Embedding(11, dim), nn.Embedding(8, dim)
        self.encoder = nn.TransformerEncoderLayer(16, 4, 24, 0.1, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoderLayer(16, 4, 24, 0.1, batch_first=True, norm_first=True)
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, 11)
        if (dim, e, s, c, fe, fd) != (16, 4, 4, 4, 24, 24):
            self.encoder.self_attn, self.decoder.self_attn = PlainAttention(dim, e), PlainAttention(dim, s)
            self.decoder.multihead_attn, self.decoder.norm3 = PlainAttention(dim, c), nn.LayerNorm(dim)
            for layer, hidden in ((self.encoder, fe), (self.decoder, fd)):
                layer.linear1, layer.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
                layer.norm1, layer.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def embedded(self, ids):
        return self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))

    def forward(self, source, target):
        memory = self.encoder(self.embedded(source))
        mask = torch.full((target.shape[1],) * 2, float("-inf"), dtype=memory.dtype).triu(1)
        return self.out(self.norm(self.decoder(self.embedded(target), memory, tgt_mask=mask)))


class Mlp(nn.Module):
    """Two linear layers with GELU."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.act, self.drop, self.fc2 = (
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(hidden, dim),
        )

    def forward(self, x):
        return self.fc2(self.drop(self.act(self.fc1(x))))


class LayerScale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(1e-1 * torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """timm's pre-norm block."""

    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(dim, eps=1e-6), _FusedQKV(dim, heads), LayerScale(dim)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, hidden), LayerScale(dim)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


@architecture(
    IMAGE,
    {
        "dim": "patch.weight:0",
        "h0": "blocks.0.attn.proj.weight:1/4",
        "m0": "blocks.0.mlp.fc1.weight:0",
        "h1": "blocks.1.attn.proj.weight:1/4",
        "m1": "blocks.1.mlp.fc1.weight:0",
    },
    {"*.qkv.*:0": blocks(3)},
)
class ViT(nn.Module):
    """Vision transformer: class token, positional embedding, layer scale."""

    def __init__(self, dim=16, h0=4, m0=24, h1=4, m1=24):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, stride=4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, dim) * 0.1)
        self.blocks = nn.Sequential(Block(dim, h0, m0), Block(dim, h1, m1))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.norm(self.blocks(x + self.pos_embed))
        return self.head(x[:, 0])


@architecture(
    IMAGE,
    {
        "dim": "patch.weight:0",
        "t0": "mix.0.fc1.weight:0",
        "c0": "channel.0.fc1.weight:0",
        "t1": "mix.1.fc1.weight:0",
        "c1": "channel.1.fc1.weight:0",
    },
)
class Mixer(nn.Module):
    """MLP-Mixer: over the tokens (whose number stays), then over the channels."""

    def __init__(self, dim=16, t0=12, c0=24, t1=12, c1=24):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, stride=4)
        self.mix, self.channel = nn.ModuleList([Mlp(16, t0), Mlp(16, t1)]), nn.ModuleList([Mlp(dim, c0), Mlp(dim, c1)])
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(5))
        self.head = nn.Linear(dim, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        for i in range(2):
            x = x + self.mix[i](self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + self.channel[i](self.norms[2 * i + 1](x))
        return self.head(self.norms[4](x).mean(dim=1))
