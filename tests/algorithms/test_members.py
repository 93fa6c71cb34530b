"""One walk over a module finds what torch's own two find, in their order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastslim import models
from fastslim.algorithms.members import members


class Tied(nn.Module):
    """A layer that is there twice, a tied weight, a child that is None, a shared buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False))
        self.again = self.first
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.first[0].weight
        self.register_module("nothing", None)
        self.register_buffer("own", self.first[1].running_mean)
        self.scripted = torch.jit.script(nn.Linear(2, 2))
        self.scale = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize("make", [Tied, lambda: models.create_model("mobilenet_v2"), nn.Identity])
def test_members_are_those_of_torch(make):
    module = make()
    for mine, theirs in zip(members(module), (module.parameters(), module.buffers()), strict=True):
        assert [id(tensor) for tensor in mine] == [id(tensor) for tensor in theirs]
