"""Networks with a concat, with grouped convolutions and with attention, small enough to run everywhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Concat(nn.Module):
    """Two branches side by side, read by one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.left, self.right = nn.Conv2d(16, 24, 1), nn.Conv2d(16, 8, 3, padding=1)
        self.join, self.fc = nn.Conv2d(40, 32, 1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to logits."""
        x = self.stem(x)
        x = torch.cat([self.left(x), self.right(x), self.right(x.flip(-1))], 1)
        return self.fc(torch.relu(self.join(x)).mean((2, 3)))


class Grouped(nn.Module):
    """A grouped and a depthwise convolution, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(32, 32, 5, padding=2, groups=32)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to logits."""
        x = self.stem(x)
        x = x + torch.relu(self.grouped(x))
        return self.fc(self.pool(self.depthwise(x)).flatten(1))


class Attention(nn.Module):
    """Self-attention over patches, written out, with a residual and an MLP."""

    def __init__(self, heads: int = 4, head: int = 8) -> None:
        super().__init__()
        dim = heads * head
        self.heads, self.head = heads, head
        self.embed = nn.Conv2d(3, dim, 4, stride=4)
        self.norm, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.fc = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to logits."""
        x = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, self.head)).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return self.fc((x + self.mlp(x)).mean(1))


NETS = {"concat": Concat, "grouped": Grouped, "attention": Attention}
