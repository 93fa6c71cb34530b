"""Networks whose forward is rewritten at narrow widths, and the narrow networks they must equal."""

import copy

import torch
from torch import nn

import fastslim

RATIOS = [i / 8 for i in range(1, 9)]


class Scaled(nn.Module):
    """Uses a parameter directly and mentions its channel count: narrow widths need another forward."""

    def __init__(self, c, function=None):
        super().__init__()
        self.c, self.function = c, function
        self.scale = nn.Parameter(torch.randn(c, 1, 1))

    def forward(self, x, factor=1, *, flag=False, more=None):
        if self.function is not None:
            return self.function(self, x)
        x = x.view(-1, self.c, *x.shape[2:]) * self.scale * factor
        if more is not None:
            x = x + more["bias"]
        return -x if flag else x


class Net(nn.Module):
    """A convolution, the module above, and a convolution."""

    def __init__(self, c=8, function=None, call=None):
        super().__init__()
        self.first, self.scaled, self.last = nn.Conv2d(3, c, 3, padding=1), Scaled(c, function), nn.Conv2d(c, 4, 1)
        self.call = call

    def forward(self, x):
        x = self.first(x)
        return self.last(self.scaled(x) if self.call is None else self.call(self.scaled, x))


def converted(model, inputs=(2, 3, 8, 8)):
    """(converted model, plain copy) in float64, narrow, with the module's rewritten forward."""
    torch.manual_seed(0)
    model = model.double()
    plain = copy.deepcopy(model)
    report = fastslim.convert(model, inputs, choices=RATIOS, divisor=1)
    report.mutator.set_min_choices()
    return model, plain


def narrow(model, plain, build=Net):
    """The network built narrow, with the first channels' weights."""
    c = next(iter(model._fastslim_mutator.current_choices.values()))
    result = build(c)
    result.function, result.scaled.function, result.call = None, plain.scaled.function, plain.call
    full = plain.state_dict()
    state = {key: full[key][tuple(slice(size) for size in value.shape)] for key, value in result.state_dict().items()}
    result.double().load_state_dict(state)
    return result.train(model.training)


def image(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def assert_is_narrow(model, plain, x):
    torch.testing.assert_close(model(x), narrow(model, plain)(x), rtol=1e-10, atol=1e-10)
