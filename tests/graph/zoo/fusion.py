"""Networks that fuse branches, embeddings and graphs: stacks, learned weights, dot products, codes, points."""

import torch
import torch.nn.functional as F
from torch import nn

from .architecture import architecture, blocks, image, side
from .cnn import IMAGE, conv_bn
from .transformers import tokens


@architecture(IMAGE, {"stem": "stem.0.weight:0", "out": "a.0.weight:0", "mid": "fc.weight:0"})
class SelectiveKernel(nn.Module):
    """SKNet: branches are stacked in a dimension of their own, a softmax over it chooses."""

    def __init__(self, stem=8, out=16, mid=6):
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, stem), conv_bn(stem, out, 3), conv_bn(stem, out, 5)
        self.fc, self.fcs = nn.Linear(out, mid), nn.ModuleList(nn.Linear(mid, out) for _ in range(2))
        self.head = nn.Linear(out, 10)

    def forward(self, x):
        x = self.stem(x)
        feats = torch.stack([F.relu(self.a(x)), F.relu(self.b(x))], dim=1)
        z = F.relu(self.fc(torch.sum(feats, dim=1).mean(-1).mean(-1)))
        attention = torch.cat([fc(z).unsqueeze(1) for fc in self.fcs], dim=1).softmax(1)
        return self.head((feats * attention.unsqueeze(-1).unsqueeze(-1)).sum(dim=1).mean((2, 3)))


@architecture(IMAGE, {"c": "a.0.weight:0", "mid": "mix.bn.weight:0", "out": "last.bn.weight:0"})
class WeightedFusion(nn.Module):
    """BiFPN: resolutions are summed with learned positive weights; separable convolutions."""

    class Separable(nn.Module):
        def __init__(self, i, o):
            super().__init__()
            self.depthwise = nn.Conv2d(i, i, 3, padding=1, groups=i, bias=False)
            self.pointwise, self.bn = nn.Conv2d(i, o, 1), nn.BatchNorm2d(o, momentum=0.01, eps=1e-3)

        def forward(self, x):
            return self.bn(self.pointwise(self.depthwise(x)))

    def __init__(self, c=12, mid=8, out=16):
        super().__init__()
        self.a, self.b = conv_bn(3, c), conv_bn(3, c, stride=2)
        self.w, self.mix, self.last = nn.Parameter(torch.ones(3)), self.Separable(c, mid), self.Separable(mid, out)
        self.head = nn.Linear(out, 10)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        w = F.relu(self.w)
        w = w / (torch.sum(w, dim=0) + 1e-4)
        y = self.mix(F.silu(w[0] * a + w[1] * F.interpolate(b, scale_factor=2) + w[2] * F.max_pool2d(a, 3, 1, 1)))
        return self.head(self.last(y).mean((2, 3)))


def users_and_items(batch):
    return tokens(3)(batch) + image(6)(batch)


@architecture(users_and_items, {"factors": "user.weight:1", "hidden": "item.0.weight:0"}, classifies=False)
class TwoTowers(nn.Module):
    """Recommendation: summed embeddings and an MLP meet in dot products and a cosine."""

    def __init__(self, factors=16, hidden=12):
        super().__init__()
        self.user, self.bias = nn.Embedding(11, factors), nn.Embedding(11, 1)
        self.item = nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, factors))

    def forward(self, users, item):
        user, item = self.user(users).sum(1), self.item(item)
        score = (user * item).sum(-1) + self.bias(users).sum((1, 2))
        scores = F.normalize(user, dim=1) @ F.normalize(item, dim=1).T
        return score, scores, F.cosine_similarity(user, item, dim=1)


@architecture(
    IMAGE,
    {"c": "enc.weight:0", "code": "dec.weight:1", "hidden": "dec.weight:0"},
    {"mu.*:0": blocks(2)},
    classifies=False,
)
class Variational(nn.Module):
    """A variational autoencoder: mean and variance from one layer, fixed noise of the code's size."""

    def __init__(self, c=8, code=8, hidden=24):
        super().__init__()
        self.enc, self.mu = nn.Conv2d(3, c, 4, 4), nn.Linear(c * 16, 2 * code)
        self.dec, self.out = nn.Linear(code, hidden), nn.Linear(hidden, 3 * 16 * 16)

    def forward(self, x):
        mean, log_var = self.mu(F.relu(self.enc(x)).flatten(1)).chunk(2, dim=-1)
        noise = torch.arange(mean.shape[1], dtype=mean.dtype).sin()
        z = mean + noise * torch.exp(0.5 * log_var)
        kl = -0.5 * torch.mean(1 + log_var - mean.pow(2) - log_var.exp())
        return self.out(F.relu(self.dec(z))).view(x.shape), kl


def nodes_and_edges(batch):
    edges = torch.rand(batch, 5, 5, dtype=torch.float64)
    return image(5, 6)(batch) + (edges / edges.sum(-1, keepdim=True),)


@architecture(
    nodes_and_edges,
    {"h1": "w1:1", "h2": "lin.weight:0", "out": "merge.weight:0"},
    {"merge.weight:1": side("h2", "h2", "h1")},
)
class GraphNet(nn.Module):
    """Graph convolutions by matrix products, jumping knowledge, mean and maximum over nodes."""

    def __init__(self, h1=12, h2=16, out=8):
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(6, h1)), nn.Parameter(torch.zeros(h1))
        self.lin, self.merge, self.head = nn.Linear(h1, h2, bias=False), nn.Linear(2 * h2 + h1, out), nn.Linear(out, 10)

    def forward(self, x, adjacency):
        h1 = F.relu(torch.matmul(adjacency, x @ self.w1) + self.b1)
        h2 = F.elu(torch.bmm(adjacency, self.lin(h1)))
        pooled = torch.cat([h2.mean(1), h2.max(dim=1).values, h1.sum(dim=1)], dim=-1)
        return self.head(F.relu(self.merge(pooled)))


@architecture(
    image(3, 12),
    {"c2": "c2.weight:0", "t1": "t.0.weight:0", "t2": "t.3.weight:0", "fc": "fc.weight:0"},
    full=("c1.weight:0",),
)
class PointNet(nn.Module):
    """Points: channels are turned by a matrix that is predicted, and therefore stay; then a maximum."""

    def __init__(self, c2=16, t1=8, t2=12, fc=12):
        super().__init__()
        self.k, self.c1, self.c2 = 6, nn.Conv1d(3, 6, 1), nn.Conv1d(6, c2, 1)
        self.t = nn.Sequential(
            nn.Conv1d(6, t1, 1),
            nn.BatchNorm1d(t1),
            nn.AdaptiveMaxPool1d(1),
            nn.Conv1d(t1, t2, 1),
            nn.Flatten(),
            nn.ReLU(),
        )
        self.turn, self.fc, self.head = nn.Linear(t2, 36), nn.Linear(c2, fc), nn.Linear(fc, 10)

    def forward(self, x):
        x = F.relu(self.c1(x))
        matrix = self.turn(self.t(x)).view(-1, self.k, self.k) + torch.eye(self.k, dtype=x.dtype)
        x = torch.bmm(x.transpose(2, 1), matrix).transpose(2, 1)
        return self.head(F.relu(self.fc(torch.max(self.c2(x), 2, keepdim=True)[0].view(x.shape[0], -1))))


@architecture(image(3, 8, 8), {"c": "conv.weight:0", "d": "d.weight:0"}, {"d.weight:1": side("c", 2)})
class Coordinates(nn.Module):
    """CoordConv: the pixel's place is appended; a prototype for each class is as near as it looks."""

    def __init__(self, c=12, d=16):
        super().__init__()
        self.conv, self.d, self.prototypes = (
            nn.Conv2d(3, c, 1),
            nn.Conv2d(c + 2, d, 1),
            nn.Parameter(torch.randn(10, d)),
        )

    def forward(self, x):
        x = F.relu(self.conv(x))
        n, _, h, w = x.shape
        ys = torch.linspace(-1, 1, h, dtype=x.dtype).view(1, 1, h, 1).expand(n, 1, h, w)
        xs = torch.linspace(-1, 1, w, dtype=x.dtype).view(1, 1, 1, w).expand(n, 1, h, w)
        x = self.d(torch.cat([x, ys, xs], 1)).tanh().mean((2, 3))
        return -((x.unsqueeze(1) - self.prototypes.unsqueeze(0)) ** 2).sum(-1)


@architecture(
    image(2, 24),
    {"res": "start.weight:0", "g0": "outs.0.weight:1", "g1": "outs.1.weight:1", "skip": "skips.0.weight:0"},
)
class WaveNet(nn.Module):
    """Causal dilated convolutions with gates; what every layer skips is summed."""

    def __init__(self, res=12, g0=8, g1=8, skip=16):
        super().__init__()
        self.start, self.head = nn.Conv1d(2, res, 1), nn.Linear(skip, 10)
        self.filters = nn.ModuleList(nn.Conv1d(res, g, 2, dilation=2**i) for i, g in enumerate((g0, g1)))
        self.gates = nn.ModuleList(nn.Conv1d(res, g, 2, dilation=2**i) for i, g in enumerate((g0, g1)))
        self.outs = nn.ModuleList(nn.Conv1d(g, res, 1) for g in (g0, g1))
        self.skips = nn.ModuleList(nn.Conv1d(g, skip, 1) for g in (g0, g1))

    def forward(self, x):
        x, total = self.start(x), 0
        for i, (f, gate, out, skip) in enumerate(zip(self.filters, self.gates, self.outs, self.skips, strict=True)):
            padded = F.pad(x, (2**i, 0))
            y = torch.tanh(f(padded)) * torch.sigmoid(gate(padded))
            total = total + skip(y)
            x = x + out(y)
        return self.head(F.relu(total)[:, :, -1])
