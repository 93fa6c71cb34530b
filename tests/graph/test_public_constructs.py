"""Constructs of public models: at every width equal to the original with the weights of absent channels at zero."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastslim


class Rotary(nn.Module):
    """Rotary embedding: frequencies twice side by side, against entries of a head, which all stay."""

    def __init__(self):
        super().__init__()
        self.stem, self.q, self.k, self.v, self.out = (nn.Linear(6, 16), *(nn.Linear(16, 16) for _ in range(4)))
        self.register_buffer("frequencies", torch.rand(2))

    def forward(self, x):
        x = self.stem(x)
        angles = torch.arange(x.shape[1])[:, None] * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        q, k, v = (layer(x).view(*x.shape[:-1], -1, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = (t * angles.cos() + torch.cat((-t[..., 2:], t[..., :2]), dim=-1) * angles.sin() for t in (q, k))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:-1], -1)
        return self.out(x)


class Windows(nn.Module):
    """Swin: head size computed from another layer's channels, a table picked by indices, a mask written in place."""

    heads = 4

    def __init__(self):
        super().__init__()
        self.stem, self.qkv, self.out = nn.Linear(6, 16), nn.Linear(16, 48), nn.Linear(16, 3)
        self.table = nn.Parameter(torch.randn(7, self.heads))
        self.register_buffer("index", torch.arange(4)[:, None] - torch.arange(4) + 3)

    def forward(self, x):
        x = self.stem(x)
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        attention = q @ k.transpose(-2, -1) + self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1)
        mask = x.new_zeros(n, n)
        mask[:2, 2:] = -100
        attention = (attention + mask).softmax(-1)
        return self.out((attention @ v).transpose(1, 2).reshape(b, n, c))


class Keywords(nn.Module):
    """Bloom: `baddbmm` with its matrices as keywords."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(5, 3)

    def forward(self, x):
        bias = x.new_ones(x.shape[0], x.shape[1], x.shape[1])
        return self.out(bias.baddbmm(batch1=self.a(x), batch2=self.b(x).transpose(1, 2), beta=0.5))


class Shortcuts(nn.Module):
    """RepGhostNet: an empty Sequential is the identity."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.shortcut, self.out = nn.Linear(6, 16), nn.Linear(16, 16), nn.Sequential(), nn.Linear(16, 3)

    def forward(self, x):
        x = self.a(x)
        return self.out(F.relu(self.b(x)).add_(self.shortcut(x)))


class SplitAttention(nn.Module):
    """ResNeSt: two branches side by side, their weights reshaped by a channel count of another tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.gate, self.fc, self.out = (nn.Linear(n, m) for n, m in ((6, 32), (16, 8), (8, 32), (16, 3)))

    def forward(self, x):
        x = self.a(x)
        b, n, c = x.shape
        x = x.reshape(b, n, 2, c // 2)
        weights = self.fc(F.relu(self.gate(x.sum(2).mean(1))))
        weights = weights.view(b, 1, 2, -1).transpose(1, 2).softmax(1).reshape(b, -1)
        return self.out((x * weights.reshape(b, 1, 2, c // 2)).sum(2))


class OneHead(nn.Module):
    """PVT: attention with a single head, by whose size it is scaled."""

    def __init__(self):
        super().__init__()
        self.stem, self.qkv, self.out = nn.Linear(6, 16), nn.Linear(16, 48), nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x)
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 1, 16).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], 16))


class Repeated(nn.Module):
    """GC-ViT: samples repeated by a computed number."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        whole, pieces = self.a(x.mean(1)), self.b(x).flatten(0, 1)
        return self.out(pieces * whole.repeat_interleave(pieces.shape[0] // whole.shape[0], dim=0))


class Caching(nn.Module):
    """ConViT: forward keeps a tensor for the size it met last."""

    def __init__(self):
        super().__init__()
        self.register_buffer("places", torch.zeros(1, 1))
        self.a, self.b, self.out = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.randn(16))

    def forward(self, x):
        if self.places.shape[1] != x.shape[1]:
            self.places = torch.arange(x.shape[1], dtype=x.dtype)[None, :]
        return self.out(self.a(x) * self.scale + self.b(x) * self.places[..., None])


class Sliced(nn.Module):
    """Halo attention: a parameter used directly, and slices up to a size."""

    def __init__(self):
        super().__init__()
        self.stem, self.out, self.scale = nn.Linear(6, 16), nn.Linear(16, 3), nn.Parameter(torch.randn(16))

    def forward(self, x):
        x = self.stem(x) * self.scale
        n = x.shape[1]
        return self.out(torch.cat((x, x), dim=1)[:, :n].expand(-1, n, -1))


class TwoTables(nn.Module):
    """BoTNet: two parameters of one module are multiplied with; their channels must not have one name."""

    def __init__(self):
        super().__init__()
        self.stem, self.out = nn.Linear(6, 16), nn.Linear(32, 3)
        self.rows, self.columns = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        x = self.stem(x)
        return self.out(torch.cat((x @ self.rows, F.relu(x @ self.columns)), dim=-1))


CONSTRUCTS = {
    Rotary: ("stem", "q", "v"),
    Windows: ("stem", "qkv"),
    Keywords: ("a",),
    Shortcuts: ("a",),
    SplitAttention: ("a", "gate"),
    Sliced: ("stem",),
    TwoTables: ("stem",),
    OneHead: ("stem",),
    Repeated: ("a",),
    Caching: (),
}


def masked(plain, trace, widths):
    """The network with every weight that belongs to an absent channel at zero."""
    plain = copy.deepcopy(plain)
    for name, parameter in plain.named_parameters():
        for dim, index in enumerate(trace.index_of(name, widths) if name in trace.tensors else ()):
            if index is not None:
                absent = torch.ones(parameter.shape[dim], dtype=torch.bool)
                absent[index] = False
                parameter.data.movedim(dim, 0)[absent] = 0
    return plain


@pytest.mark.parametrize("construct", CONSTRUCTS, ids=lambda construct: construct.__name__)
def test_narrow_network_equals_the_masked_one(construct):
    torch.manual_seed(0)
    model = construct().double().eval()
    plain, x = copy.deepcopy(model), torch.randn(2, 4 if construct is Windows else 5, 6, dtype=torch.double)
    mutator = fastslim.convert(model, x, divisor=1, seed=0).mutator
    assert torch.equal(model(x), plain(x))
    for widths in (mutator.min_choices, *(mutator.sample_choices() for _ in range(4))):
        mutator.set_choices(widths)
        torch.testing.assert_close(model(x), masked(plain, mutator.trace, widths)(x), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(fastslim.export_subnet(model, widths)(x), model(x), rtol=1e-10, atol=1e-12)
    for layer in CONSTRUCTS[construct]:
        index = mutator.trace.index_of(f"{layer}.weight", mutator.min_choices)[0]
        assert index is not None and len(index) < len(plain.get_parameter(f"{layer}.weight"))


class Capturing(nn.Module):
    """Transformers: the first forward registers hooks, which collect the outputs of layers."""

    def __init__(self):
        super().__init__()
        self.layers, self.out = nn.ModuleList([nn.Linear(6, 16), nn.Linear(16, 16)]), nn.Linear(32, 3)
        self.installed, self.outputs = False, []

    def forward(self, x):
        if not self.installed:
            self.installed = True
            for layer in self.layers:
                layer.register_forward_hook(lambda module, args, output: self.outputs.append(output))
        self.outputs.clear()
        for layer in self.layers:
            x = layer(x)
        return self.out(torch.cat(self.outputs, dim=-1))


def test_hooks_that_forward_registers_are_not_left_behind():
    model, x = Capturing(), torch.randn(2, 6)
    plain = copy.deepcopy(model)
    fastslim.convert(model, x)
    assert not model.installed and not model.outputs and not any(layer._forward_hooks for layer in model.layers)
    torch.testing.assert_close(model(x), plain(x))
