"""Language models: LLaMA's and GPT-2's blocks."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .architecture import architecture, blocks
from .attention import HEAD
from .transformers import tokens


class RMSNorm(nn.Module):
    """Root-mean-square norm, written out."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class Llama(nn.Module):
    """See `TinyLlama`."""

    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.heads, inner = heads, heads * HEAD
        self.wq, self.wk, self.wv = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.wo = nn.Linear(inner, dim, bias=False)
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.norm1, self.norm2 = RMSNorm(dim), nn.RMSNorm(dim, eps=1e-6)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        y = self.norm1(x)
        q, k, v = (layer(y).view(b, t, self.heads, HEAD).transpose(1, 2) for layer in (self.wq, self.wk, self.wv))
        q, k = (z * cos + self.rotated(z) * sin for z in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous().view(b, t, -1)
        x = x + self.wo(y)
        y = self.norm2(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))

    def rotated(self, x):
        x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return torch.cat((-x2, x1), dim=-1)


@architecture(
    tokens(6),
    {
        "dim": "embed.weight:1",
        "h0": "layers.0.wo.weight:1/4",
        "m0": "layers.0.w1.weight:0",
        "h1": "layers.1.wo.weight:1/4",
        "m1": "layers.1.w1.weight:0",
    },
    classifies=False,
)
class TinyLlama(nn.Module):
    """Causal language model: RMSNorm, rotary positions, SwiGLU, the head tied to the embedding."""

    def __init__(self, dim=16, h0=4, m0=24, h1=4, m1=24):
        super().__init__()
        self.embed = nn.Embedding(11, dim)
        self.layers = nn.ModuleList([Llama(dim, h0, m0), Llama(dim, h1, m1)])
        self.norm, self.head = RMSNorm(dim), nn.Linear(dim, 11, bias=False)
        self.head.weight = self.embed.weight
        angles = torch.outer(torch.arange(8.0), 1 / 100 ** (torch.arange(0, HEAD, 2) / HEAD)).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, self.cos[: ids.shape[1]], self.sin[: ids.shape[1]])
        return self.head(self.norm(x))


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight lies the other way round."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.2), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        size_out = x.size()[:-1] + (self.nf,)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


@architecture(
    tokens(6),
    {"dim": "wte.weight:1", "heads": "c_proj.weight:0/4", "hidden": "c_fc.weight:1"},
    {"c_attn.weight:1": blocks(3), "c_attn.bias:0": blocks(3)},
    classifies=False,
)
class GPT2(nn.Module):
    """Transposed linear layers by addmm, split by size, a triangular mask in a buffer."""

    def __init__(self, dim=16, heads=4, hidden=24):
        super().__init__()
        self.num_heads, self.head_dim, self.split_size = heads, HEAD, heads * HEAD
        self.wte, self.wpe = nn.Embedding(11, dim), nn.Embedding(8, dim)
        self.ln_1, self.ln_2, self.ln_f = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.c_attn, self.c_proj = Conv1D(3 * heads * HEAD, dim), Conv1D(dim, heads * HEAD)
        self.c_fc, self.c_out, self.lm_head = Conv1D(hidden, dim), Conv1D(dim, hidden), nn.Linear(dim, 11, bias=False)
        self.register_buffer("bias", torch.tril(torch.ones(8, 8, dtype=torch.bool)).view(1, 1, 8, 8))

    def _split_heads(self, x):
        return x.view(x.size()[:-1] + (self.num_heads, self.head_dim)).permute(0, 2, 1, 3)

    def forward(self, ids):
        length = ids.size(-1)
        x = self.wte(ids) + self.wpe(torch.arange(length).unsqueeze(0))
        query, key, value = self.c_attn(self.ln_1(x)).split(self.split_size, dim=2)
        q, k, v = self._split_heads(query), self._split_heads(key), self._split_heads(value)
        w = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(v.size(-1))
        w = torch.where(self.bias[:, :, :length, :length], w, torch.finfo(w.dtype).min)
        y = torch.matmul(w.softmax(dim=-1), v).permute(0, 2, 1, 3).contiguous()
        x = x + self.c_proj(y.view(y.size()[:-2] + (y.size(-2) * y.size(-1),)))
        x = x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))
        return self.lm_head(self.ln_f(x))
