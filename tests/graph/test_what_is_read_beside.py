"""Operations with a second tensor that says where to read or what to write: its channels do not shrink unseen."""

import torch
import torch.nn.functional as F
from torch import nn

import fastslim
from fastslim.graph import trace


class Sampled(nn.Module):
    """Deformable reading: the offsets have two channels, x and y, and both are needed."""

    def __init__(self):
        super().__init__()
        self.stem, self.offsets, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 2, 1), nn.Linear(16, 5)

    def forward(self, x):
        grid = torch.tanh(self.offsets(x)).permute(0, 2, 3, 1)
        return self.head(F.grid_sample(self.stem(x), grid, align_corners=False).mean((2, 3)))


class Copied(nn.Module):
    """One layer's output is written into another's."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 1), nn.Conv2d(16, 5, 1)

    def forward(self, x):
        y = self.a(x) * 0
        y.copy_(self.b(x))
        return self.head(y)


def test_sampling_points_stay_whole():
    units = {unit.members: unit for unit in trace(Sampled(), (1, 3, 8, 8)).units}
    assert units["stem",].mutable
    assert not units["offsets",].mutable and "says where to read" in units["offsets",].reason


def test_what_is_copied_changes_with_what_it_is_copied_to():
    model = Copied()
    report = fastslim.convert(model, (1, 3, 4, 4), choices=[0.25, 1], divisor=1)
    assert report.units[0].members == ("a", "b")
    report.mutator.set_min_choices()
    x = torch.randn(2, 3, 4, 4)
    expected = F.conv2d(F.conv2d(x, model.b.weight[:4], model.b.bias[:4]), model.head.weight[:, :4], model.head.bias)
    torch.testing.assert_close(model(x), expected)
