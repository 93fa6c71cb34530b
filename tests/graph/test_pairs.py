"""Which convolutions a plan calls together with the batch norm behind them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fastslim.graph.pairs import with_pairs
from fastslim.nn import SlimBatchNorm2d, SlimConv2d

CALL = "conv_batch_norm_call"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = SlimConv2d(4, 4, 3, padding=1, bias=False), SlimBatchNorm2d(4)
        self.side, self.side_norm = SlimConv2d(4, 4, 1, bias=False), SlimBatchNorm2d(4)


def graph_of(forward) -> tuple[fx.Graph, Net]:
    class Leaves(fx.Tracer):
        def is_leaf_module(self, module, name):
            return True

    net = Net().train()
    type(net).forward = forward
    return Leaves().trace(net), net


def calls(graph: fx.Graph) -> list[str]:
    return [getattr(n.target, "__name__", str(n.target)) for n in graph.nodes if n.op not in ("placeholder", "output")]


def chain(self, x):
    return F.relu(self.norm(self.conv(x)))


def residual(self, x):
    y = self.conv(x)
    return self.norm(y, self.side_norm(self.side(x)), "relu")


def read_twice(self, x):
    y = self.conv(x)
    return self.norm(y) + y


def changed_between(self, x):
    y = self.conv(x)
    x.relu_()
    return self.norm(y) + x


def no_norm(self, x):
    return self.side(self.conv(x))


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (chain, [CALL, "relu"]),
        (residual, [CALL, CALL]),
        (read_twice, ["conv", "norm", "add"]),
        (changed_between, ["conv", "relu_", "norm", "add"]),
        (no_norm, ["conv", "side"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_called_together(forward, expected):
    graph, net = graph_of(forward)
    before, paired = calls(graph), with_pairs(graph, net)
    paired.lint()
    assert calls(paired) == expected
    assert calls(graph) == before
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(fx.GraphModule(net, paired)(x.clone()), forward(net, x.clone()), rtol=0, atol=0)
