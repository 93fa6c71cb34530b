"""The stem of a plan: which calls belong to it, what ends it, and that both parts together are the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_plan import prepare
from torch import Tensor, nn

from fastslim import models
from fastslim.graph import Stem, make_plan

IMAGES = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """conv -> what is tried -> BN -> ReLU -> conv -> BN -> ReLU -> fc."""

    def __init__(self, middle: nn.Module | None = None, bias: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=bias), nn.BatchNorm2d(16)
        self.middle = nn.Identity() if middle is None else middle
        self.body, self.body_norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)

    def stem(self, x: Tensor) -> Tensor:
        return self.middle(F.relu(self.norm(self.conv(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))

    def head(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.body_norm(self.body(x))).mean((2, 3)))


def stem_of(model: nn.Module, images: Tensor | tuple = IMAGES, **options) -> Stem | str:
    torch.manual_seed(0)
    plan, reasons = make_plan(prepare(model.double().train(), images).trace, **options)
    assert plan is not None, reasons
    return plan.stem


def calls_of(model: nn.Module, **options) -> tuple[str, ...]:
    stem = stem_of(model, **options)
    assert isinstance(stem, Stem), stem
    return stem.calls


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "conv1 bn1 relu maxpool"),
        ("resnet50", "conv1 bn1 relu maxpool"),
        ("mobilenet_v2", "features.0.0 features.0.1 relu6 features.1.conv.0.0 features.1.conv.0.1 relu6"),
    ],
)
def test_the_stem_of_public_networks(name, expected):
    assert " ".join(calls_of(getattr(models, name)(num_classes=4))) == expected


@pytest.mark.parametrize(
    "middle",
    [
        nn.MaxPool2d(2),
        nn.AvgPool2d(3, 2, 1),
        nn.GELU(),
        nn.LeakyReLU(0.2),
        nn.Sigmoid(),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.Conv2d(16, 16, 5, 2, 2, groups=16, bias=True, padding_mode="reflect"),
    ],
    ids=lambda m: type(m).__name__,
)
def test_what_computes_every_channel_by_itself_belongs_to_it(middle):
    assert calls_of(Net(middle)) == ("conv", "norm", "relu", "middle")


@pytest.mark.parametrize(
    "middle",
    [
        nn.Conv2d(16, 16, 1),  # reads channels that are sliced
        nn.Conv2d(16, 16, 3, groups=4),
        nn.GroupNorm(4, 16),
        nn.Dropout(0.1),
        nn.Dropout2d(0.1),
        nn.RReLU(),
        nn.Softmax(1),
        nn.PReLU(16),
    ],
    ids=lambda m: type(m).__name__,
)
def test_what_needs_other_channels_parameters_or_chance_ends_it(middle):
    assert calls_of(Net(middle)) == ("conv", "norm", "relu")


class SqueezeExcite(Net):
    def stem(self, x):
        x = super().stem(x)
        return x * torch.sigmoid(x.mean((2, 3), keepdim=True))


def test_a_gate_made_of_means_ends_it():
    stem = stem_of(SqueezeExcite())
    assert stem.calls == ("conv", "norm", "relu", "middle") and len(stem.widths) == 1


class Sum(Net):
    """RepVGG's first block: two convolutions of the image, normalised and added."""

    def __init__(self):
        super().__init__()
        self.side, self.side_norm = nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16)

    def stem(self, x):
        return F.relu(self.norm(self.conv(x)) + self.side_norm(self.side(x)))


def test_branches_are_added_inside_it():
    stem = stem_of(Sum())
    assert set(stem.calls) == {"conv", "norm", "side", "side_norm", "relu"}
    assert len(stem.norms) == 2 and [len(width) for width in stem.widths] == [2]


class Scaled(Net):
    def stem(self, x):
        return 2 * super().stem((x - 0.5) / 0.25)


def test_arithmetic_with_numbers_belongs_to_it():
    calls = [call.removeprefix("Tensor.") for call in calls_of(Scaled())]
    assert calls == ["sub", "div", "conv", "norm", "relu", "middle", "mul"]


class Skips(Net):
    """The stem is read in two places, the image in a third."""

    def __init__(self):
        super().__init__()
        self.image = nn.Conv2d(3 + 16, 16, 1)

    def head(self, x):
        return super().head(x) + self.fc(x.mean((2, 3)))

    def forward(self, x):
        y = self.conv(x)
        z = F.relu(self.norm(y))
        return self.head(z) + self.head(self.image(torch.cat([x, y], 1)))


class Twice(Net):
    """The batch norm runs a second time on what is no part of the stem."""

    def head(self, x):
        return super().head(self.norm(self.body(x)))


def test_a_batch_norm_that_is_called_twice_ends_it():
    assert calls_of(Twice()) == ("conv",)


@pytest.mark.parametrize("build", [Net, Sum, Scaled, Skips, SqueezeExcite, Twice], ids=lambda build: build.__name__)
def test_both_parts_together_are_the_whole(build):
    torch.manual_seed(0)
    model = build().double().train()
    plan, _ = make_plan(prepare(model, IMAGES).trace)
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    values = plan.stem.run(model, images)
    assert len(values) == len(plan.stem.widths)
    torch.testing.assert_close(plan.stem.rest(model, *values, images), plan(images), rtol=0, atol=0)


class InPlace(Net):
    def head(self, x):
        x += 1.0
        return super().head(x)


class InPlaceInside(nn.Module):
    """Watched, so that nobody looks into it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return self.conv(x.mul_(2.0))


@pytest.mark.parametrize(
    ("build", "keep"), [(InPlace, []), (lambda: Net(InPlaceInside()), ["middle"])], ids=["seen", "inside"]
)
def test_an_output_that_is_changed_in_place_is_not_shared(build, keep):
    assert stem_of(build(), keep=keep) == "the network changes the stem's output in place"


@pytest.mark.parametrize(
    ("watched", "expected"),
    [
        ("conv", "conv is watched by a hook or recorder"),
        ("norm", ("conv",)),
        ("middle", ("conv", "norm", "relu")),
        ("body", ("conv", "norm", "relu", "middle")),
    ],
)
def test_a_watched_layer_ends_it(watched, expected):
    stem = stem_of(Net(), keep=[watched])
    assert (stem if isinstance(stem, str) else stem.calls) == expected


def test_a_network_that_starts_otherwise_has_none():
    class Grouped(Net):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 16, 3, padding=1, groups=2)

    assert stem_of(Grouped(), torch.randn(2, 4, 8, 8).double()) == "conv has groups"

    class Vectors(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 4)

        def forward(self, x):
            return self.b(F.relu(self.norm(self.a(x[:, :, None, None]))).flatten(1))

    assert stem_of(Vectors(), torch.randn(2, 8).double()) == "no convolution reads the network's input"


def test_only_images_among_several_inputs_are_read_by_it():
    class Two(Net):
        def forward(self, scale, x):
            return self.head(self.stem(x)) * scale

    stem = stem_of(Two(), (torch.ones(4, 5).double(), IMAGES))
    assert stem.reads == (1,)
