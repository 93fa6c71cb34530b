"""Parameters used in unusual ways: twice, by functions, by hooks; outputs and inputs of unusual kinds."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .architecture import architecture, side
from .cnn import IMAGE, conv_bn
from .transformers import tokens


@architecture(IMAGE, {"stem": "stem.0.weight:0", "mid": "a.weight:0"})
class Shared(nn.Module):
    """A block called twice, and two convolutions with one weight."""

    def __init__(self, stem=16, mid=12):
        super().__init__()
        self.stem, self.block = conv_bn(3, stem), nn.Sequential(conv_bn(stem, stem), nn.ReLU(inplace=True))
        self.a, self.b = nn.Conv2d(stem, mid, 3, padding=1), nn.Conv2d(stem, mid, 3, padding=1)
        self.b.weight = self.a.weight
        self.head = nn.Linear(mid, 10)

    def forward(self, x):
        x = self.block(self.block(F.relu(self.stem(x))))
        return self.head((F.relu(self.a(x)) + self.b(x).sigmoid()).mean((2, 3)))


class Blur(nn.Module):
    """Anti-aliased pooling: a fixed filter for every channel, kept as a buffer."""

    def __init__(self, channels):
        super().__init__()
        kernel = torch.tensor([1.0, 2.0, 1.0])
        kernel = (kernel[:, None] * kernel[None, :] / 16)[None, None]
        self.register_buffer("filt", kernel.repeat(channels, 1, 1, 1))

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.filt, stride=2, groups=x.shape[1])


@architecture(IMAGE, {"c1": "weight:0", "c2": "proj:0", "c3": "c3.weight:0"})
class Functional(nn.Module):
    """Parameters without a layer, and a blur with a buffer."""

    def __init__(self, c1=8, c2=16, c3=12):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(c1, 3, 3, 3) * 0.3), nn.Parameter(torch.zeros(c1))
        self.blur, self.proj = Blur(c1), nn.Parameter(torch.randn(c2, c1) * 0.3)
        self.c3, self.head = nn.Conv2d(c2, c3, 3), nn.Parameter(torch.randn(c3, 10) * 0.3)

    def forward(self, x):
        x = self.blur(F.relu(F.conv2d(x, self.weight, self.bias, padding=1)))
        x = F.linear(x.permute(0, 2, 3, 1), self.proj).permute(0, 3, 1, 2)
        return F.relu(self.c3(F.relu(x))).mean((2, 3)) @ self.head


@architecture(IMAGE, {"a": "a.0.weight:0", "b": "b.0.weight:0", "out": "c.weight:0"})
class InPlace(nn.Module):
    """Sums and products in place, on views too."""

    def __init__(self, a=16, b=12, out=8):
        super().__init__()
        self.a, self.a2, self.b = conv_bn(3, a), conv_bn(a, a), conv_bn(a, b)
        self.c, self.head = nn.Conv2d(b, out, 1), nn.Linear(out, 10)
        self.register_buffer("mask", torch.ones(16, 16).triu())

    def forward(self, x):
        x = self.a(x)
        y = self.a2(x)
        y += x
        y.mul_(0.5).relu_()
        x = self.b(y)
        x *= self.mask
        x = x.clamp_(min=-1).transpose_(2, 3)
        return self.head(self.c(x).mean((2, 3)))


@architecture(IMAGE, {"stem": "stem.0.weight:0", "out": "out.weight:0"}, full=("written.weight:0",))
class Surgery(nn.Module):
    """Some channels are overwritten in place: their layer stays as it is."""

    def __init__(self, stem=16, out=12):
        super().__init__()
        self.stem, self.written = conv_bn(3, stem), nn.Conv2d(stem, 8, 3, padding=1)
        self.out, self.head = nn.Conv2d(8, out, 1), nn.Linear(out, 10)

    def forward(self, x):
        x = self.written(F.relu(self.stem(x)))
        x[:, 2:5] = 0.5
        x[:, 0, 0, 0] += 1
        return self.head(F.relu(self.out(x)).mean((2, 3)))


def double(module, args, output):
    return output * 2


def shift(module, args):
    return (args[0] + 0.25,)


@architecture(IMAGE, {"stem": "stem.0.weight:0", "mid": "mid.0.weight:0"})
class Hooked(nn.Module):
    """Hooks change what goes into a layer and what comes out of another."""

    def __init__(self, stem=16, mid=12):
        super().__init__()
        self.stem, self.mid, self.head = conv_bn(3, stem), conv_bn(stem, mid), nn.Linear(mid, 10)
        self.stem[0].register_forward_hook(double)
        self.mid.register_forward_pre_hook(shift)

    def forward(self, x):
        return self.head(F.relu(self.mid(F.relu(self.stem(x)))).mean((2, 3)))


@architecture(
    tokens(6),
    {"hidden": "fc.weight:0", "c3": "c3.weight:0", "c5": "c5.weight:0"},
    {"fc.weight:1": side("c3", "c5", 16)},
    full=("lstm.weight_hh_l0:0", "embed.weight:1"),
)
class TextNet(nn.Module):
    """An LSTM, which stays, beside convolutions over the text with maxima over time."""

    def __init__(self, c3=8, c5=8, hidden=12):
        super().__init__()
        self.embed, self.lstm = (
            nn.Embedding(11, 12, padding_idx=0),
            nn.LSTM(12, 8, batch_first=True, bidirectional=True),
        )
        self.c3, self.c5 = nn.Conv1d(12, c3, 3, padding=1), nn.Conv1d(12, c5, 5, padding=2)
        self.fc, self.head = nn.Linear(c3 + c5 + 16, hidden), nn.Linear(hidden, 10)

    def forward(self, ids):
        x = self.embed(ids)
        state, _ = self.lstm(x)
        x = x.transpose(1, 2)
        pooled = [F.max_pool1d(F.relu(c), c.size(2)).squeeze(2) for c in (self.c3(x), self.c5(x))]
        return self.head(F.relu(self.fc(torch.cat([*pooled, state[:, -1]], dim=1))))


def pair(batch):
    return dict(zip(("left", "right"), IMAGE(batch) + IMAGE(batch), strict=True))


class Embeddings(NamedTuple):
    """What `Siamese` returns."""

    left: torch.Tensor
    right: torch.Tensor
    distance: torch.Tensor


@architecture(
    pair,
    {"c1": "net.0.0.weight:0", "c2": "net.2.0.weight:0", "mix": "mix.weight:0"},
    {"mix.weight:1": side("c2", "c2")},
    classifies=False,
)
class Siamese(nn.Module):
    """One network for two inputs, called by keywords; a named tuple."""

    def __init__(self, c1=8, c2=16, mix=12):
        super().__init__()
        self.net = nn.Sequential(conv_bn(3, c1, stride=2), nn.ReLU(), conv_bn(c1, c2, stride=2), nn.ReLU())
        self.embed, self.mix, self.out = nn.Linear(c2, 6), nn.Linear(2 * c2, mix), nn.Linear(mix, 1)

    def forward(self, *, left, right):
        left, right = self.net(left).mean((2, 3)), self.net(right).mean((2, 3))
        distance = self.out(F.relu(self.mix(torch.cat([(left - right).abs(), left * right], 1))))
        return Embeddings(F.normalize(self.embed(left), dim=1), F.normalize(self.embed(right), dim=1), distance)


@dataclass
class Prediction:
    """What `ManyOutputs` returns."""

    logits: torch.Tensor
    features: tuple[torch.Tensor, ...]
    step: int = 1


@architecture(IMAGE, {"stem": "stem.0.weight:0"}, full=("side.weight:0",), classifies=False)
class ManyOutputs(nn.Module):
    """A dataclass with features, which are outputs and therefore stay, beside logits."""

    def __init__(self, stem=16):
        super().__init__()
        self.stem, self.side, self.head = conv_bn(3, stem), nn.Conv2d(stem, 8, 1), nn.Linear(8, 10)

    def forward(self, x):
        features = self.side(F.relu(self.stem(x)))
        return Prediction(self.head(features.mean((2, 3))), (features, features.sum(1)))
