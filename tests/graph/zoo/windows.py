"""Vision networks with windows, channels-last norms and layer scale: Swin and ConvNeXt."""

import torch
import torch.nn.functional as F
from torch import nn

from .architecture import architecture, blocks, image, side
from .attention import HEAD
from .transformers import Mlp


def window_partition(x, window_size):
    B, H, W, C = x.shape
    x = x.view(B, H // window_size, window_size, W // window_size, window_size, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window_size, window_size, C)


def window_reverse(windows, window_size, H, W):
    B = int(windows.shape[0] / (H * W / window_size / window_size))
    x = windows.view(B, H // window_size, W // window_size, window_size, window_size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, -1)


class WindowAttention(nn.Module):
    """Attention within windows, with a table of biases by relative position and head."""

    def __init__(self, dim, window_size, heads):
        super().__init__()
        self.dim, self.window_size, self.num_heads, self.scale = heads * HEAD, window_size, heads, HEAD**-0.5
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window_size - 1) ** 2, heads) * 0.5)
        grid = torch.stack(torch.meshgrid(torch.arange(window_size), torch.arange(window_size), indexing="ij")).flatten(
            1
        )
        relative = (grid[:, :, None] - grid[:, None, :]).permute(1, 2, 0) + window_size - 1
        self.register_buffer("relative_position_index", relative[..., 0] * (2 * window_size - 1) + relative[..., 1])
        self.qkv, self.proj, self.attn_drop = nn.Linear(dim, 3 * self.dim), nn.Linear(self.dim, dim), nn.Dropout(0.1)
        self.softmax = nn.Softmax(dim=-1)

    def attend(self, x, mask):
        B_, N, C = x.shape
        qkv = self.qkv(x).reshape(B_, N, 3, self.num_heads, self.dim // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(
            self.window_size * self.window_size, self.window_size * self.window_size, -1
        )
        attn = attn + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            nW = mask.shape[0]
            attn = attn.view(B_ // nW, nW, self.num_heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, N, N)
        return (self.attn_drop(self.softmax(attn)) @ v).transpose(1, 2)

    def forward(self, x, mask=None):
        B_, N, C = x.shape
        return self.proj(self.attend(x, mask).reshape(B_, N, C))

    def narrow_forward(self, x, mask=None):
        return self.proj(self.attend(x, mask).flatten(2))


class SwinBlock(nn.Module):
    """Window attention, shifted in every other block, and an MLP."""

    def __init__(self, dim, heads, hidden, resolution, shift):
        super().__init__()
        self.resolution, self.shift, self.window_size = resolution, shift, 2
        self.norm1, self.attn = nn.LayerNorm(dim), WindowAttention(dim, 2, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, hidden)
        mask = None
        if shift:
            region = torch.zeros(1, resolution, resolution, 1)
            for i, rows in enumerate((slice(0, -2), slice(-2, -1), slice(-1, None))):
                for j, columns in enumerate((slice(0, -2), slice(-2, -1), slice(-1, None))):
                    region[:, rows, columns] = 3 * i + j
            windows = window_partition(region, 2).view(-1, 4)
            mask = (windows[:, None] - windows[:, :, None]).ne(0) * -100.0
        self.register_buffer("attn_mask", mask)

    def forward(self, x):
        H = W = self.resolution
        B, L, C = x.shape
        assert L == H * W, "input feature has wrong size"
        shortcut = x
        x = self.norm1(x).view(B, H, W, C)
        if self.shift > 0:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        windows = window_partition(x, self.window_size).view(-1, self.window_size * self.window_size, C)
        windows = self.attn(windows, mask=self.attn_mask).view(-1, self.window_size, self.window_size, C)
        x = window_reverse(windows, self.window_size, H, W)
        if self.shift > 0:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        x = shortcut + x.view(B, H * W, C)
        return x + self.mlp(self.norm2(x))


@architecture(
    image(3, 8, 8),
    {
        "dim": "patch.weight:0",
        "h0": "a.attn.proj.weight:1/4",
        "m0": "a.mlp.fc1.weight:0",
        "h1": "b.attn.proj.weight:1/4",
        "m1": "b.mlp.fc1.weight:0",
        "out": "reduction.weight:0",
    },
    {"*.qkv.*:0": blocks(3), "merge_norm.*:0": side(*["dim"] * 4), "reduction.weight:1": side(*["dim"] * 4)},
)
class Swin(nn.Module):
    """Windows, shifted windows, and patches merged from every other row and column."""

    def __init__(self, dim=16, h0=4, m0=24, h1=4, m1=24, out=24):
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, dim, 2, 2), nn.LayerNorm(dim)
        self.a, self.b = SwinBlock(dim, h0, m0, 4, 0), SwinBlock(dim, h1, m1, 4, 1)
        self.merge_norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, out, bias=False)
        self.last, self.head = nn.LayerNorm(out), nn.Linear(out, 10)

    def forward(self, x):
        x = self.b(self.a(self.norm(self.patch(x).flatten(2).transpose(1, 2))))
        B, L, C = x.shape
        x = x.view(B, 4, 4, C)
        x = torch.cat([x[:, 0::2, 0::2, :], x[:, 1::2, 0::2, :], x[:, 0::2, 1::2, :], x[:, 1::2, 1::2, :]], -1)
        x = self.reduction(self.merge_norm(x.view(B, -1, 4 * C)))
        return self.head(torch.flatten(F.adaptive_avg_pool1d(self.last(x).transpose(1, 2), 1), 1))


class ChannelsFirstNorm(nn.Module):
    """ConvNeXt's layer norm over the channels of an image, written out."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ChannelsLastNorm(nn.Module):
    """The same by F.layer_norm, over a shape kept as a number."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.normalized_shape = (channels,)

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, 1e-6)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, then an MLP in channels-last order, then layer scale."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(dim, dim, 7, padding=3, groups=dim), ChannelsLastNorm(dim)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
        self.gamma = nn.Parameter(0.1 * torch.ones(dim))

    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


@architecture(
    image(3, 16, 16),
    {"dim": "stem.0.weight:0", "m0": "a.pwconv1.weight:0", "dim2": "down.1.weight:0", "m1": "b.pwconv1.weight:0"},
)
class ConvNeXt(nn.Module):
    """Norms in both orders, written out and by the functional; layer scale."""

    def __init__(self, dim=12, m0=24, dim2=16, m1=32):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, dim, 4, 4), ChannelsFirstNorm(dim))
        self.a, self.b = ConvNeXtBlock(dim, m0), ConvNeXtBlock(dim2, m1)
        self.down = nn.Sequential(ChannelsFirstNorm(dim), nn.Conv2d(dim, dim2, 2, 2))
        self.norm, self.head = nn.LayerNorm(dim2, eps=1e-6), nn.Linear(dim2, 10)

    def forward(self, x):
        x = self.b(self.down(self.a(self.stem(x))))
        return self.head(self.norm(x.mean([-2, -1])))
