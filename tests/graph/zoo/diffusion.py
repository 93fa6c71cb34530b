"""A denoising U-Net: a time embedding into every block, attention in the middle, skips, group norms."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .architecture import architecture, blocks, image, side

GROUP = 4


def timestep_embedding(t, dim):
    half = dim // 2
    freqs = torch.exp(-math.log(100) * torch.arange(half, dtype=t.dtype) / half)
    args = t[:, None] * freqs[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


class ResBlock(nn.Module):
    """Group norms and convolutions; the time is added, or scales and shifts."""

    def __init__(self, i, mid, o, time, scale_shift):
        super().__init__()
        self.use_scale_shift_norm = scale_shift
        self.norm1, self.conv1 = nn.GroupNorm(i // GROUP, i), nn.Conv2d(i, mid, 3, padding=1)
        self.emb = nn.Linear(time, 2 * mid if scale_shift else mid)
        self.norm2, self.conv2 = nn.GroupNorm(mid // GROUP, mid), nn.Conv2d(mid, o, 3, padding=1)
        self.skip = nn.Conv2d(i, o, 1)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        emb_out = self.emb(F.silu(emb))
        while len(emb_out.shape) < len(h.shape):
            emb_out = emb_out[..., None]
        if self.use_scale_shift_norm:
            scale, shift = torch.chunk(emb_out, 2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + emb_out)
        return self.skip(x) + self.conv2(F.silu(h))


class AttentionBlock(nn.Module):
    """Attention over pixels; queries, keys and values lie together for each of four heads.

    The size of a head is computed from the number of channels, so it is that which changes.
    """

    def __init__(self, channels, head):
        super().__init__()
        self.num_heads, self.norm = 4, nn.GroupNorm(channels // GROUP, channels)
        self.qkv, self.proj = nn.Conv1d(channels, 12 * head, 1), nn.Conv1d(4 * head, channels, 1)

    def forward(self, x):
        b, c, *spatial = x.shape
        qkv = self.qkv(self.norm(x).reshape(b, c, -1))
        bs, width, length = qkv.shape
        ch = width // (3 * self.num_heads)
        q, k, v = qkv.reshape(bs * self.num_heads, ch * 3, length).split(ch, dim=1)
        scale = 1 / math.sqrt(math.sqrt(ch))
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(bs, -1, length)
        return x + self.proj(h).reshape(b, c, *spatial)


def noisy(batch):
    return image(3, 8, 8)(batch) + (torch.arange(batch, dtype=torch.float64) * 3,)


@architecture(
    noisy,
    {
        "base": "stem.weight:0/4",
        "time": "time.0.weight:0",
        "time2": "time.2.weight:0",
        "d_mid": "down.conv1.weight:0/4",
        "d": "down.conv2.weight:0/4",
        "head": "attn.proj.weight:1/4",
        "m_mid": "mid.conv1.weight:0/4",
        "m": "mid.conv2.weight:0/4",
        "u_mid": "up.conv1.weight:0/4",
        "u": "up.conv2.weight:0/4",
    },
    {
        "attn.qkv.*:0": blocks(12),
        "attn.proj.weight:1": blocks(4),
        "mid.emb.*:0": blocks(2),
        "up.norm1.*:0": side(("m", GROUP), ("base", GROUP)),
        "up.conv1.weight:1": side(("m", GROUP), ("base", GROUP)),
        "up.skip.weight:1": side(("m", GROUP), ("base", GROUP)),
    },
    classifies=False,
)
class Diffusion(nn.Module):
    """Denoising U-Net; all widths but the time embedding's count groups of four channels."""

    def __init__(self, base=4, time=16, time2=16, d_mid=4, d=4, head=4, m_mid=4, m=4, u_mid=4, u=2):
        super().__init__()
        base, d_mid, d, m_mid, m, u_mid, u = (GROUP * n for n in (base, d_mid, d, m_mid, m, u_mid, u))
        self.time = nn.Sequential(nn.Linear(8, time), nn.SiLU(), nn.Linear(time, time2))
        self.stem, self.down = nn.Conv2d(3, base, 3, padding=1), ResBlock(base, d_mid, d, time2, False)
        self.attn, self.mid = AttentionBlock(d, head), ResBlock(d, m_mid, m, time2, True)
        self.up = ResBlock(m + base, u_mid, u, time2, False)
        self.out = nn.Sequential(nn.GroupNorm(u // GROUP, u), nn.SiLU(), nn.Conv2d(u, 3, 3, padding=1))

    def forward(self, x, t):
        emb = self.time(timestep_embedding(t, 8))
        x = self.stem(x)
        h = self.mid(self.attn(self.down(F.avg_pool2d(x, 2), emb)), emb)
        h = F.interpolate(h, scale_factor=2, mode="nearest")
        return self.out(self.up(torch.cat([h, x], dim=1), emb))
