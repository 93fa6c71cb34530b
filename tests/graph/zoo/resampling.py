"""Networks that change resolution, of one to three dimensions: U-Net, autoencoder, pixel shuffle, dense heads."""

import torch
import torch.nn.functional as F
from torch import nn

from .architecture import architecture, image, side
from .cnn import IMAGE, conv_bn


@architecture(
    IMAGE,
    {
        "c1": "enc1.0.weight:0",
        "c2": "enc2.0.weight:0",
        "c3": "mid.0.weight:0",
        "u2": "up2.weight:1",
        "d2": "dec2.0.weight:0",
        "u1": "up1.weight:1",
        "d1": "dec1.0.weight:0",
    },
    {"dec2.0.weight:1": side("u2", "c2"), "dec1.0.weight:1": side("c1", "u1")},
    classifies=False,
)
class UNet(nn.Module):
    """Transposed convolutions up, skips concatenated on either side."""

    def __init__(self, c1=8, c2=12, c3=16, u2=12, d2=12, u1=8, d1=8):
        super().__init__()
        self.enc1, self.enc2, self.mid = conv_bn(3, c1), conv_bn(c1, c2), conv_bn(c2, c3)
        self.up2, self.dec2 = nn.ConvTranspose2d(c3, u2, 2, stride=2), conv_bn(u2 + c2, d2)
        self.up1, self.dec1 = nn.ConvTranspose2d(d2, u1, 3, 2, 1, output_padding=1), conv_bn(c1 + u1, d1)
        self.out = nn.Conv2d(d1, 2, 1)

    def forward(self, x):
        e1 = F.relu(self.enc1(x))
        e2 = F.relu(self.enc2(F.max_pool2d(e1, 2)))
        m = F.relu(self.mid(F.max_pool2d(e2, 2)))
        d2 = F.relu(self.dec2(torch.cat((self.up2(m), e2), dim=1)))
        d1 = F.relu(self.dec1(torch.cat((e1, self.up1(d2)), dim=1)))
        return self.out(d1)


@architecture(
    IMAGE,
    {
        "c1": "enc.0.weight:0",
        "c2": "enc.2.weight:0",
        "latent": "code.weight:0",
        "d2": "dec.0.weight:0",
        "d1": "dec.0.weight:1",
    },
    classifies=False,
)
class Autoencoder(nn.Module):
    """Through a flat code and back: the decoder's image size and channels are literal numbers."""

    def __init__(self, c1=8, c2=16, latent=12, d2=16, d1=8):
        super().__init__()
        self.enc = nn.Sequential(
            nn.Conv2d(3, c1, 3, 2, 1), nn.ReLU(), nn.Conv2d(c1, c2, 3, 2, 1), nn.ReLU(), nn.Flatten()
        )
        self.code, self.expand, self.channels = nn.Linear(c2 * 16, latent), nn.Linear(latent, d2 * 16), d2
        self.dec = nn.Sequential(
            nn.ConvTranspose2d(d2, d1, 4, 2, 1), nn.BatchNorm2d(d1), nn.ReLU(), nn.ConvTranspose2d(d1, 3, 4, 2, 1)
        )

    def forward(self, x):
        z = self.expand(torch.tanh(self.code(self.enc(x))))
        return torch.sigmoid(self.dec(z.view(-1, 16, 4, 4)))

    def narrow_forward(self, x):
        z = self.expand(torch.tanh(self.code(self.enc(x))))
        return torch.sigmoid(self.dec(z.view(-1, self.channels, 4, 4)))


@architecture(
    image(3, 8, 8),
    {"stem": "stem.weight:0", "body": "body.weight:0", "up": "out.weight:1"},
    classifies=False,
)
class PixelShuffle(nn.Module):
    """Super-resolution: space to depth and back; every channel is cut with its block."""

    def __init__(self, stem=6, body=16, up=8):
        super().__init__()
        self.stem, self.unshuffle = nn.Conv2d(3, stem, 3, padding=1), nn.PixelUnshuffle(2)
        self.body, self.expand = nn.Conv2d(4 * stem, body, 3, padding=1), nn.Conv2d(body, 16 * up, 3, padding=1)
        self.shuffle, self.out = nn.PixelShuffle(2), nn.Conv2d(up, 3, 3, padding=1)

    def forward(self, x):
        y = self.expand(F.relu(self.body(self.unshuffle(self.stem(x)))))
        y = F.pixel_shuffle(self.shuffle(y), 2)
        return self.out(F.relu(y)) + F.interpolate(x, scale_factor=2, mode="bicubic")


@architecture(image(2, 32), {"c1": "c1.weight:0", "c2": "c2.weight:0", "c3": "head.weight:1/4"})
class Conv1d(nn.Module):
    """A waveform network: strided, dilated, depthwise and transposed 1-d convolutions."""

    def __init__(self, c1=8, c2=12, c3=16):
        super().__init__()
        self.c1, self.n1 = nn.Conv1d(2, c1, 5, stride=2, padding=2), nn.BatchNorm1d(c1)
        self.c2, self.n2 = nn.Conv1d(c1, c2, 3, padding=2, dilation=2), nn.BatchNorm1d(c2)
        self.dw, self.up = nn.Conv1d(c2, c2, 3, padding=1, groups=c2), nn.ConvTranspose1d(c2, c3, 4, 2, 1)
        self.act, self.head = nn.LeakyReLU(0.1), nn.Linear(c3 * 4, 10)

    def forward(self, x):
        x = F.max_pool1d(self.act(self.n1(self.c1(x))), 2)
        x = self.act(self.n2(self.c2(x)))
        x = F.adaptive_avg_pool1d(self.up(self.dw(x) + x), 4)
        return self.head(x.flatten(start_dim=1))


@architecture(image(1, 4, 8, 8), {"c1": "stem.0.weight:0", "c2": "a.0.weight:0", "c3": "up.weight:1"})
class Conv3d(nn.Module):
    """A volume network: 3-d convolutions, one of them split into space and time, and a transposed one."""

    def __init__(self, c1=8, c2=12, c3=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(1, c1, 3, padding=1), nn.BatchNorm3d(c1), nn.ReLU(inplace=True))
        self.a = nn.Sequential(nn.Conv3d(c1, c2, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(c2), nn.ReLU())
        self.b, self.pool = nn.Conv3d(c2, c1, (3, 1, 1), padding=(1, 0, 0)), nn.MaxPool3d((1, 2, 2))
        self.up, self.head = nn.ConvTranspose3d(c1, c3, 2, stride=2), nn.Linear(c3, 10)

    def forward(self, x):
        x = self.pool(self.stem(x))
        x = F.relu(x + self.b(self.a(x)))
        return self.head(F.adaptive_avg_pool3d(self.up(x), 1).flatten(1))


@architecture(
    IMAGE,
    {
        "c1": "c1.0.weight:0",
        "c2": "c2.0.weight:0",
        "c3": "c3.0.weight:0",
        "fpn": "lateral.0.weight:0",
        "smooth": "smooth.0.weight:0",
        "tower": "tower.0.0.weight:0",
    },
    classifies=False,
)
class Detector(nn.Module):
    """Feature pyramid, and one head for all levels; a list of dicts, and all boxes in one tensor."""

    def __init__(self, c1=8, c2=12, c3=16, fpn=12, smooth=12, tower=8):
        super().__init__()
        self.c1, self.c2, self.c3 = conv_bn(3, c1, stride=2), conv_bn(c1, c2, stride=2), conv_bn(c2, c3, stride=2)
        self.lateral = nn.ModuleList(nn.Conv2d(c, fpn, 1) for c in (c1, c2, c3))
        self.smooth = nn.ModuleList(nn.Conv2d(fpn, smooth, 3, padding=1) for _ in range(3))
        self.tower = nn.Sequential(conv_bn(smooth, tower), nn.ReLU())
        self.classes, self.boxes = nn.Conv2d(tower, 2 * 3, 3, padding=1), nn.Conv2d(tower, 2 * 4, 3, padding=1)

    def forward(self, x):
        c1 = F.relu(self.c1(x))
        c2 = F.relu(self.c2(c1))
        features = [lateral(c) for lateral, c in zip(self.lateral, (c1, c2, F.relu(self.c3(c2))), strict=True)]
        for i in (1, 0):
            features[i] = features[i] + F.interpolate(features[i + 1], scale_factor=2.0, mode="nearest")
        levels, boxes = [], []
        for conv, feature in zip(self.smooth, features, strict=True):
            y = self.tower(conv(feature))
            levels.append({"classes": self.classes(y), "stride": 2})
            boxes.append(self.boxes(y).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4))
        return levels, torch.cat(boxes, dim=1)


@architecture(
    IMAGE,
    {
        "stem": "stem.0.weight:0",
        "a": "a.0.weight:0",
        "b": "b.0.weight:0",
        "pooled": "pool.1.0.weight:0",
        "mix": "mix.0.weight:0",
        "aux": "aux.0.0.weight:0",
    },
    {"mix.0.weight:1": side("a", "b", "pooled")},
    classifies=False,
)
class Segmenter(nn.Module):
    """DeepLab: dilated convolutions beside a global pooling; a dict with an auxiliary head."""

    def __init__(self, stem=12, a=8, b=8, pooled=8, mix=16, aux=6):
        super().__init__()
        self.stem = conv_bn(3, stem, stride=2)
        self.a = conv_bn(stem, a, 1)
        self.b = nn.Sequential(nn.Conv2d(stem, b, 3, padding=2, dilation=2, bias=False), nn.BatchNorm2d(b))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Conv2d(stem, pooled, 1), nn.ReLU()))
        self.mix, self.classes = conv_bn(a + b + pooled, mix, 1), nn.Conv2d(mix, 3, 1)
        self.aux = nn.Sequential(conv_bn(stem, aux), nn.ReLU(), nn.Dropout2d(0.1), nn.Conv2d(aux, 3, 1))

    def forward(self, x):
        size = x.shape[-2:]
        x = F.relu(self.stem(x))
        pooled = F.interpolate(self.pool(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        y = F.relu(self.mix(torch.cat([self.a(x), self.b(x), pooled], dim=1)))
        out = F.interpolate(self.classes(y), size=size, mode="bilinear", align_corners=False)
        return {"out": out, "aux": F.interpolate(self.aux(x), size=size, mode="nearest")}
