"""Networks that split channels and put them side by side: gated, cross-stage, dual-path, multi-scale."""

import torch
import torch.nn.functional as F
from torch import nn

from .architecture import architecture, blocks, image, side
from .cnn import IMAGE, conv_bn


@architecture(
    IMAGE,
    {"stem": "stem.0.weight:0", "gated": "mix.0.weight:1", "hidden": "out.weight:1"},
    {"gate.*:0": blocks(2), "simple.*:0": blocks(2)},
)
class ChannelGLU(nn.Module):
    """Halves of the channels gate each other: F.glu, and a chunk as in NAFNet."""

    def __init__(self, stem=12, gated=16, hidden=8):
        super().__init__()
        self.stem, self.gate = conv_bn(3, stem), nn.Conv2d(stem, 2 * gated, 1)
        self.mix, self.simple = conv_bn(gated, stem), nn.Conv2d(stem, 2 * hidden, 3, padding=1)
        self.out, self.head = nn.Conv2d(hidden, stem, 1), nn.Linear(stem, 10)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.mix(F.glu(self.gate(x), dim=1))
        x1, x2 = self.simple(x).chunk(2, dim=1)
        return self.head((x + self.out(x1 * x2)).mean((2, 3)))


@architecture(
    IMAGE,
    {
        "stem": "stem.0.weight:0",
        "a": "cv1.0.weight:0 - m.0.0.0.weight:1",
        "b": "m.0.0.0.weight:1",
        "m0": "m.0.0.0.weight:0",
        "m1": "m.1.0.0.weight:0",
        "out": "cv2.0.weight:0",
    },
    {"cv1.*:0": side("a", "b"), "cv2.0.weight:1": side("a", "b", "b", "b")},
    units=0,
)
class C2f(nn.Module):
    """YOLOv8: half passes by, the other goes through residual blocks, and every stage is kept."""

    def __init__(self, stem=8, a=12, b=12, m0=8, m1=12, out=16):
        super().__init__()
        self.sizes = [a, b]
        self.stem, self.cv1 = conv_bn(3, stem), conv_bn(stem, a + b, 1)
        self.m = nn.ModuleList(nn.Sequential(conv_bn(b, m), nn.SiLU(), conv_bn(m, b), nn.SiLU()) for m in (m0, m1))
        self.cv2, self.head = conv_bn(a + 3 * b, out, 1), nn.Linear(out, 10)

    def forward(self, x):
        y = list(F.silu(self.cv1(self.stem(x))).chunk(2, 1))
        return self.rest(y)

    def narrow_forward(self, x):
        return self.rest(list(F.silu(self.cv1(self.stem(x))).split(self.sizes, 1)))

    def rest(self, y):
        for m in self.m:
            y.append(y[-1] + m(y[-1]))
        return self.head(F.silu(self.cv2(torch.cat(y, 1))).mean((2, 3)))


@architecture(
    IMAGE,
    {
        "conv": "partial.weight:1",
        "rest": "stem.0.weight:0 - partial.weight:1",
        "new": "partial.weight:0",
        "hidden": "up.0.weight:0",
    },
    {
        "stem.*:0": side("conv", "rest"),
        "up.0.weight:1": side("new", "rest"),
        "down.weight:0": side("conv", "rest"),
        "head.weight:1": side("conv", "rest"),
    },
)
class PartialConv(nn.Module):
    """FasterNet: only a quarter of the channels is convolved."""

    def __init__(self, conv=4, rest=12, new=4, hidden=24):
        super().__init__()
        self.dim_conv, self.dim_rest = conv, rest
        self.stem, self.partial = conv_bn(3, conv + rest), nn.Conv2d(conv, new, 3, padding=1, bias=False)
        self.up, self.down = conv_bn(new + rest, hidden, 1), nn.Conv2d(hidden, conv + rest, 1, bias=False)
        self.head = nn.Linear(conv + rest, 10)

    def forward(self, x):
        x = self.stem(x)
        x1, x2 = torch.split(x, [self.dim_conv, self.dim_rest], dim=1)
        y = torch.cat((self.partial(x1), x2), 1)
        return self.head((x + self.down(F.relu(self.up(y)))).mean((2, 3)))


@architecture(
    IMAGE,
    {
        "same": "same.0.weight:0",
        "new0": "stem.0.weight:0 - same.0.weight:0",
        "new1": "c1.0.weight:0 - same.0.weight:0",
        "new2": "c2.0.weight:0 - same.0.weight:0",
        "mid1": "a1.0.weight:0",
        "mid2": "a2.0.weight:0",
    },
    {
        "stem.*:0": side("same", "new0"),
        "c1.*:0": side("same", "new1"),
        "c2.*:0": side("same", "new2"),
        "same.0.weight:1": side("same", "new0"),
        "a1.0.weight:1": side("same", "new0"),
        "a2.0.weight:1": side("same", "new0", "new1"),
        "norm.*:0": side("same", "new0", "new1", "new2"),
        "head.weight:1": side("same", "new0", "new1", "new2"),
    },
)
class DualPath(nn.Module):
    """DPN: the first channels of each block's output are added, the others appended."""

    def __init__(self, same=16, new0=8, new1=8, new2=8, mid1=12, mid2=12):
        super().__init__()
        self.num_same = same
        self.stem, self.same = conv_bn(3, same + new0), conv_bn(same + new0, same, 1)
        self.a1, self.c1 = conv_bn(same + new0, mid1), conv_bn(mid1, same + new1, 1)
        self.a2, self.c2 = conv_bn(same + new0 + new1, mid2), conv_bn(mid2, same + new2, 1)
        total = same + new0 + new1 + new2
        self.norm, self.head = nn.BatchNorm2d(total), nn.Linear(total, 10)

    def block(self, x_same, x_new, a, c):
        y = c(F.relu(a(torch.cat((x_same, x_new), dim=1))))
        same, new = y[:, : self.num_same, :, :], y[:, self.num_same :, :, :]
        return x_same + same, torch.cat([x_new, new], dim=1)

    def forward(self, x):
        x = self.stem(x)
        x_same, x_new = x[:, : self.num_same] + self.same(x), x[:, self.num_same :]
        x_same, x_new = self.block(x_same, x_new, self.a1, self.c1)
        x_same, x_new = self.block(x_same, x_new, self.a2, self.c2)
        return self.head(F.relu(self.norm(torch.cat((x_same, x_new), 1))).mean((2, 3)))


@architecture(
    IMAGE,
    {
        "stem": "stem.0.weight:0",
        "s0": "convs.0.0.weight:1",
        "s1": "convs.1.0.weight:1",
        "s2": "convs.2.0.weight:1",
        "s3": "out.0.weight:1 - convs.0.0.weight:0 - convs.1.0.weight:0 - convs.2.0.weight:0",
        "last": "convs.2.0.weight:0",
    },
    {"a.*:0": side("s0", "s1", "s2", "s3"), "out.0.weight:1": side("s1", "s2", "last", "s3")},
    units=0,
)
class Res2Net(nn.Module):
    """Scales: each convolution adds the next part of the channels to what came before."""

    def __init__(self, stem=16, s0=6, s1=6, s2=6, s3=6, last=6):
        super().__init__()
        self.width, self.sizes = s0, [s0, s1, s2, s3]
        self.stem, self.a = conv_bn(3, stem), conv_bn(stem, s0 + s1 + s2 + s3, 1)
        self.convs = nn.ModuleList([conv_bn(s0, s1), conv_bn(s1, s2), conv_bn(s2, last)])
        self.out, self.head = conv_bn(s1 + s2 + last + s3, stem, 1), nn.Linear(stem, 10)

    def forward(self, x):
        x = self.stem(x)
        return self.rest(x, torch.split(F.relu(self.a(x)), self.width, 1))

    def narrow_forward(self, x):
        x = self.stem(x)
        return self.rest(x, torch.split(F.relu(self.a(x)), self.sizes, 1))

    def rest(self, x, parts):
        outs = []
        for i, conv in enumerate(self.convs):
            y = parts[i] if i == 0 else y + parts[i]  # noqa: F821
            y = F.relu(conv(y))
            outs.append(y)
        outs.append(parts[3])
        return self.head(F.relu(self.out(torch.cat(outs, 1)) + x).mean((2, 3)))


@architecture(
    IMAGE,
    {
        "stem": "stem.0.weight:0",
        "high": "b0.0.weight:0",
        "down": "down.0.weight:0",
        "low": "b1.0.weight:0",
        "out": "last.weight:0",
    },
    {"last.weight:1": side("high", "low")},
)
class HighResolution(nn.Module):
    """HRNet: two resolutions that exchange what they have, concatenated at the end."""

    def __init__(self, stem=8, high=12, down=16, low=20, out=16):
        super().__init__()
        self.stem, self.down = conv_bn(3, stem), conv_bn(stem, down, stride=2)
        self.b0, self.b1 = conv_bn(stem, high), conv_bn(down, low)
        self.fuse = nn.ModuleList(
            [
                nn.ModuleList([nn.Identity(), nn.Sequential(conv_bn(low, high, 1), nn.Upsample(scale_factor=2))]),
                nn.ModuleList([conv_bn(high, low, stride=2), nn.Identity()]),
            ]
        )
        self.last, self.head = nn.Conv2d(high + low, out, 1), nn.Linear(out, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = [F.relu(self.b0(x)), F.relu(self.b1(self.down(x)))]
        fused = []
        for row in self.fuse:
            y = row[0](x[0])
            for j in range(1, len(x)):
                y = y + row[j](x[j])
            fused.append(F.relu(y))
        low = F.interpolate(fused[1], size=(16, 16), mode="bilinear", align_corners=False)
        return self.head(F.relu(self.last(torch.cat([fused[0], low], 1))).mean((2, 3)))


@architecture(
    IMAGE,
    {"stem": "stem.weight:0", "a": "focus.0.weight:0", "b": "cv1.weight:0", "out": "cv2.0.weight:0"},
    {"focus.0.weight:1": side("stem", "stem", "stem", "stem"), "cv2.0.weight:1": side("b", "b", "b", "b", "a")},
)
class Focus(nn.Module):
    """YOLOv5: space to depth by slicing, and pyramid pooling whose maps all have the same channels."""

    def __init__(self, stem=6, a=16, b=8, out=16):
        super().__init__()
        self.stem, self.focus = nn.Conv2d(3, stem, 1), conv_bn(4 * stem, a)
        self.cv1, self.cv2 = nn.Conv2d(a, b, 1), conv_bn(4 * b + a, out, 1)
        self.pool, self.head = nn.MaxPool2d(5, 1, 2), nn.Linear(out, 10)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        skip = F.silu(self.focus(x))
        y = [self.cv1(skip)]
        y.extend(self.pool(y[-1]) for _ in range(3))
        y.append(skip)
        return self.head(F.silu(self.cv2(torch.cat(y, 1))).mean((2, 3)))


@architecture(
    image(3, 8, 8),
    {"stem": "stem.weight:0", "radix": "fc1.0.weight:1", "inter": "fc1.0.weight:0"},
    {"split.*:0": blocks(2), "fc2.*:0": blocks(2)},
)
class SplitAttention(nn.Module):
    """ResNeSt: two splits of the channels, summed for a gate, softmax over the splits."""

    def __init__(self, stem=8, radix=12, inter=6):
        super().__init__()
        self.stem, self.split = nn.Conv2d(3, stem, 3, padding=1), conv_bn(stem, 2 * radix)
        self.fc1, self.fc2 = conv_bn(radix, inter, 1), nn.Conv2d(inter, 2 * radix, 1)
        self.head = nn.Linear(radix, 10)

    def forward(self, x):
        x = F.relu(self.split(self.stem(x)))
        batch, rchannel = x.shape[:2]
        splits = torch.split(x, rchannel // 2, dim=1)
        gap = F.adaptive_avg_pool2d(sum(splits), 1)
        atten = self.fc2(F.relu(self.fc1(gap)))
        atten = F.softmax(atten.view(batch, 2, -1), dim=1).reshape(batch, -1).view(batch, -1, 1, 1)
        attens = torch.split(atten, rchannel // 2, dim=1)
        out = sum(att * split for att, split in zip(attens, splits, strict=True))
        return self.head(out.contiguous().mean((2, 3)))
