"""What networks of users do besides computing with channels, and what conversion must make of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastslim

RATIOS = [i / 8 for i in range(1, 9)]


def converted(model, shape=(2, 3, 8, 8)):
    """(converted model in float64, its mutator)."""
    torch.manual_seed(0)
    model.double()
    return model, fastslim.convert(model, shape, choices=RATIOS, divisor=1, seed=0).mutator


class OwnBatchNorm(nn.Module):
    """A batch norm written by hand, which keeps its statistics outside of the gradient."""

    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        if not self.training:
            return (x - self.mean) * self.scale
        mean = x.mean((0, 2, 3), keepdim=True)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(mean, alpha=0.1)
        return (x - mean) * self.scale


class Normalised(nn.Module):
    def __init__(self, left=8, right=8):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, left, 1), nn.Conv2d(3, right, 1)
        self.norm = OwnBatchNorm(left + right)
        self.fc = nn.Linear(left + right, 5)

    def forward(self, x):
        return self.fc(F.relu(self.norm(torch.cat([self.left(x), self.right(x)], 1))).mean((2, 3)))


def test_statistics_written_without_gradients_hold_no_graph_at_narrow_widths():
    model, mutator = converted(Normalised())
    mutator.set_choices(mutator.min_choices)
    for _ in range(2):  # a second step would go back through the first one's graph
        model(torch.randn(2, 3, 8, 8, dtype=torch.float64)).sum().backward()
    assert not model.norm.mean.requires_grad
    copy.deepcopy(model)


def test_statistics_of_joined_channels_are_written_back():
    model, mutator = converted(Normalised())
    mutator.set_choices(mutator.min_choices)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model(x)
    active = mutator.trace.index_of("norm.mean", mutator.min_choices)[1]
    assert active.tolist() == [0, 8]
    joined = torch.cat([model.left(x), model.right(x)], 1).mean((0, 2, 3))
    expected = torch.zeros(16, dtype=torch.float64).index_put((active,), 0.1 * joined)
    torch.testing.assert_close(model.norm.mean.flatten(), expected)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_rewritten_forward_leaves_the_gradient_mode_as_it_was(enabled):
    model, mutator = converted(Normalised())
    mutator.set_choices(mutator.min_choices)
    with torch.set_grad_enabled(enabled):
        out = model(torch.randn(2, 3, 8, 8, dtype=torch.float64))
        assert torch.is_grad_enabled() == out.requires_grad == enabled


def test_an_exported_forward_refuses_the_mode_it_was_not_recorded_in():
    model, mutator = converted(Normalised())
    exported = fastslim.export_subnet(model, mutator.min_choices)
    mutator.set_choices(mutator.min_choices)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(exported.eval()(x), model.eval()(x))
    with pytest.raises(AssertionError, match=r"OwnBatchNorm computes something else in training mode.*call eval"):
        exported.train()(x)


class Steps(nn.Module):
    """A recurrent network, which takes as many steps as its input is long."""

    def __init__(self, width=8):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(width))
        self.step, self.inner, self.out = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x, scale=1.0):
        state = self.first.expand(x.shape[0], -1)
        for piece in x.unbind(1):
            state = torch.tanh(self.inner(state) * scale + self.step(piece))
        return self.out(state)


def test_an_exported_forward_refuses_what_it_was_not_recorded_for():
    model, mutator = converted(Steps(), (2, 4, 6))
    exported = fastslim.export_subnet(model, mutator.min_choices)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    exported(x[:, :4])
    with pytest.raises(AssertionError, match=r"a size decides at .*, and it was 4 with the example inputs"):
        exported(x)  # four of the five steps would be wrong without a word
    with pytest.raises(AssertionError, match=r"the argument scale is a constant, and it was 1\.0"):
        exported(x[:, :4], scale=2.0)


class ScaledSums(nn.Module):
    """Attention of one head over positions, scaled by a number made of its width, then a mean written as a sum."""

    def __init__(self, width=16, inner=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1)
        self.query, self.key, self.value = (
            nn.Conv2d(width, inner, 1),
            nn.Conv2d(width, inner, 1),
            nn.Conv2d(width, 6, 1),
        )
        self.scale, self.count = inner**-0.5, 6

    def forward(self, x):
        x = F.relu(self.stem(x))
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        attention = (query.transpose(1, 2) @ key * self.scale).softmax(-1)
        return (value @ attention.transpose(1, 2)).sum(1) / self.count


def test_sums_scaled_by_a_number_made_of_their_count_stay_whole():
    model, mutator = converted(ScaledSums())
    assert [unit.num_channels for unit in mutator.mutable_units] == [16]
    assert "summed and scaled" in str(mutator.trace.report)


def test_channels_padded_by_a_number_of_channels_run_at_every_width():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(16, 3, 1)

        def forward(self, x):
            x = self.first(x)
            return self.second(F.pad(x, (0, 0, 0, 0, 0, x.shape[1])))

    model, mutator = converted(Padded())
    for choices in (mutator.max_choices, mutator.min_choices):
        mutator.set_choices(choices)
        assert model(torch.randn(2, 3, 8, 8, dtype=torch.float64)).shape == (2, 3, 8, 8)


def test_distances_of_pairs_are_followed():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Sequential(nn.Flatten(), nn.Linear(192, 16))

        def forward(self, x):
            return F.pairwise_distance(self.embed(x), self.embed(x.flip(3)))

    _, mutator = converted(Pair())
    assert len(mutator.mutable_units) == 1


def test_sums_scaled_by_a_number_that_forward_computes_follow_the_width():
    class Computed(ScaledSums):
        def forward(self, x):
            query, key, value = (layer(self.stem(x)).flatten(2) for layer in (self.query, self.key, self.value))
            attention = (query.transpose(1, 2) @ key * query.shape[1] ** -0.5).softmax(-1)
            return value @ attention.transpose(1, 2)

    model = Computed()
    del model.scale
    _, mutator = converted(model)
    assert [unit.num_channels for unit in mutator.mutable_units] == [16, 8]
