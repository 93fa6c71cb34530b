"""What several tests of algorithms look at."""

from __future__ import annotations

import pytest
from torch import nn

from fastslim.nn import SlimConv2d


@pytest.fixture
def calls(monkeypatch) -> list[nn.Module]:
    """Every convolution that is called."""
    seen: list[nn.Module] = []
    forward = SlimConv2d.forward
    monkeypatch.setattr(SlimConv2d, "forward", lambda conv, x: (seen.append(conv), forward(conv, x))[1])
    return seen
