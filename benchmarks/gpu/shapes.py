"""The shapes all GPU benchmarks and the paper arithmetic share: layers of ResNet-18, ResNet-50 and MobileNetV2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

BATCH = 64
RATIOS = (1.0, 0.75, 0.5, 0.25)
DIVISOR = 8


class Conv(NamedTuple):
    """A dense convolution layer: full and active channels, kernel and stride, pixels along a side of its input."""

    c_in: int
    c_out: int
    kernel: int
    stride: int
    pixels: int
    active_in: int
    active_out: int

    @property
    def out_pixels(self) -> int:
        return -(-self.pixels // self.stride)

    def __str__(self) -> str:
        stride = f" s{self.stride}" if self.stride > 1 else ""
        return f"{_widths(self)}, {self.kernel}x{self.kernel}{stride}, {self.pixels} px"


class Linear(NamedTuple):
    """A linear layer: full and active features."""

    c_in: int
    c_out: int
    active_in: int
    active_out: int

    def __str__(self) -> str:
        return _widths(self)


def _widths(layer: Conv | Linear) -> str:
    whole = (layer.active_in, layer.active_out) == (layer.c_in, layer.c_out)
    return f"{layer.active_in}->{layer.active_out}" + ("" if whole else f" of {layer.c_in}->{layer.c_out}")


class Depthwise(NamedTuple):
    """A depthwise convolution layer."""

    channels: int
    stride: int
    pixels: int
    kernel: int = 3

    @property
    def out_pixels(self) -> int:
        return -(-self.pixels // self.stride)

    def __str__(self) -> str:
        return f"{self.channels} ch, {self.kernel}x{self.kernel} s{self.stride}, {self.pixels} px"


class Norm(NamedTuple):
    """Batch normalisation with what follows it."""

    channels: int
    pixels: int
    activation: str
    residual: bool = False

    def __str__(self) -> str:
        return f"{self.channels} ch, {self.pixels} px, {self.activation}{' + residual' if self.residual else ''}"


class Loss(NamedTuple):
    """The logits of a sandwich step."""

    rows: int
    classes: int
    students: int = 3

    def __str__(self) -> str:
        return f"{self.rows} x {self.classes}, 1 + {self.students}"


RESNET = (  # c_in, c_out, kernel, stride, pixels; the last two are ResNet-18's
    (3, 64, 7, 2, 224),
    (64, 64, 1, 1, 56),
    (64, 64, 3, 1, 56),
    (64, 256, 1, 1, 56),
    (256, 64, 1, 1, 56),
    (128, 128, 3, 2, 56),
    (256, 512, 1, 2, 56),
    (128, 512, 1, 1, 28),
    (512, 128, 1, 1, 28),
    (128, 128, 3, 1, 28),
    (256, 256, 3, 1, 14),
    (1024, 256, 1, 1, 14),
    (512, 512, 3, 1, 7),
    (2048, 512, 1, 1, 7),
    (64, 128, 3, 2, 56),
    (256, 512, 3, 2, 14),
)
MOBILENET = (  # 1x1: c_in, c_out, pixels
    (32, 16, 112),
    (16, 96, 112),
    (96, 24, 56),
    (24, 144, 56),
    (144, 32, 28),
    (192, 64, 14),
    (384, 96, 14),
    (576, 160, 7),
    (960, 320, 7),
    (320, 1280, 7),
)
LINEAR = ((2048, 1000), (1280, 1000))
MOBILENET_DEPTHWISE = (
    Depthwise(32, 1, 112),
    Depthwise(96, 2, 112),
    Depthwise(144, 1, 56),
    Depthwise(144, 2, 56),
    Depthwise(192, 2, 28),
    Depthwise(384, 1, 14),
    Depthwise(576, 2, 14),
    Depthwise(960, 1, 7),
)
OTHER_DEPTHWISE = (  # odd widths and larger kernels
    *(Depthwise(channels, 1, 28) for channels in (8, 24, 40, 72, 120, 200)),
    Depthwise(40, 2, 28, 5),
    Depthwise(120, 1, 28, 5),
    Depthwise(200, 1, 14, 7),
)
NORMS = (
    Norm(64, 112, "relu"),
    Norm(64, 56, "relu"),
    Norm(256, 56, "relu", residual=True),
    Norm(128, 28, "relu"),
    Norm(512, 28, "relu", residual=True),
    Norm(256, 14, "relu"),
    Norm(1024, 14, "relu", residual=True),
    Norm(512, 7, "relu"),
    Norm(2048, 7, "relu", residual=True),
    Norm(32, 112, "relu6"),
    Norm(96, 112, "relu6"),
    Norm(144, 56, "relu6"),
    Norm(24, 56, "none", residual=True),
    Norm(192, 28, "relu6"),
    Norm(384, 14, "relu6"),
    Norm(960, 7, "relu6"),
    Norm(1280, 7, "relu6"),
    Norm(40, 28, "silu"),
    Norm(72, 56, "hardswish", residual=True),
)
LOSSES = (Loss(64, 1000), Loss(256, 1000), Loss(4, 200_000))


def active(channels: int, ratio: float) -> int:
    """Channels at a width ratio, in multiples of :data:`DIVISOR`; images keep their 3."""
    return channels if channels <= DIVISOR else max(DIVISOR, round(channels * ratio / DIVISOR) * DIVISOR)


def convs(ratio_in: float = 1.0, ratio_out: float = 1.0) -> Iterator[Conv]:
    """All dense convolutions at one pair of width ratios."""
    one_by_one = ((c_in, c_out, 1, 1, pixels) for c_in, c_out, pixels in MOBILENET)
    for layer in (*RESNET, *one_by_one):
        yield Conv(*layer, active(layer[0], ratio_in), active(layer[1], ratio_out))


def linears(ratio_in: float = 1.0) -> Iterator[Linear]:
    """The classifiers, whose outputs stay full."""
    for c_in, c_out in LINEAR:
        yield Linear(c_in, c_out, active(c_in, ratio_in), c_out)


def depthwise() -> Iterator[Depthwise]:
    """All depthwise convolutions."""
    yield from (*MOBILENET_DEPTHWISE, *OTHER_DEPTHWISE)
