"""Networks around a function, and what their recordings look like."""

import torch
from torch import nn

from fastslim.graph.capture import bind_inputs, capture
from fastslim.graph.flat import flatten_frames


class Net(nn.Module):
    """A convolution, with `function(self, y)` behind it."""

    def __init__(self, function, **parts):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, self.conv(x))


class Child(nn.Module):
    """The same without a convolution, and any arguments."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.full((4, 1, 1), 2.0))

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def record(model, inputs=(2, 3, 4, 4), **kwargs):
    return capture(model, bind_inputs(model, inputs), **kwargs)


def targets(frame):
    return [getattr(n.target, "__name__", n.target) for n in frame.graph.nodes if n.op not in ("placeholder", "output")]


def obstacles(captured):
    return [reason for frame in captured.frames() for reason in frame.obstacles]


def assert_replays(captured, model, inputs):
    """The recorded graphs, put together, compute what forward does."""
    module = torch.fx.GraphModule(model, flatten_frames(captured))
    torch.testing.assert_close(module(*inputs), model(*inputs))
