"""Units that keep the channels with the largest weights."""

import copy

import pytest
import torch
from torch import nn
from unit_cases import FIRST, SECOND, SHAPE, THIRD, Net, randomise_statistics

from fastslim.errors import FastslimRuntimeError
from fastslim.models import mobilenet_v2, resnet18
from fastslim.mutators import ChannelAnalyzer, ChannelMutator, ChannelUnit, L1MutableChannelUnit

X = torch.randn(2, *SHAPE[1:])


def masked(model, units):
    """The full network with the outputs of channels that are not active set to zero, and what comes of it."""

    def silence(mask):
        return lambda module, args, y: y * mask.view(1, -1, 1, 1)

    model = copy.deepcopy(model)
    masks = {name: unit.mutable_channel.current_mask for name, unit in units.items()}
    for layer in ("bn", "same", "depthwise"):
        model.get_submodule(layer).register_forward_hook(silence(masks[FIRST]))
    model.joined.register_forward_hook(silence(torch.cat([masks[SECOND], masks[THIRD]])))
    return model(X)


def prepared(how, model):
    if how == "mutator":
        mutator = ChannelMutator(L1MutableChannelUnit, example_inputs=SHAPE)
        mutator.prepare_from_supernet(model)
        return mutator.name2unit
    units = ChannelUnit.init_from_channel_analyzer(model, ChannelAnalyzer(SHAPE))
    made = [L1MutableChannelUnit.init_from_channel_unit(unit) for unit in units]
    for unit in made:
        unit.prepare_for_pruning(model)
    return {unit.name: unit for unit in made}


@pytest.mark.parametrize("how", ["mutator", "alone"])
def test_the_network_computes_what_the_full_one_does_without_the_other_channels(how):
    model = randomise_statistics(Net())
    full, reference = model(X), copy.deepcopy(model)
    units = prepared(how, model)
    assert {name for name, unit in units.items() if unit.is_mutable} == {FIRST, SECOND, THIRD}
    torch.testing.assert_close(model(X), full)
    for widths in ((3, 7, 2), (1, 12, 5), (8, 1, 1)):
        for name, width in zip((FIRST, SECOND, THIRD), widths, strict=True):
            units[name].current_choice = width
            assert units[name].mutable_channel.activated_channels == width
        torch.testing.assert_close(model(X), masked(reference, units))


def test_the_largest_weights_are_kept_as_they_are_now():
    model = Net()
    units = prepared("mutator", model)
    with torch.no_grad():
        for layer in (model.first, model.same, model.depthwise):
            layer.weight.fill_(0.1)
            layer.weight[[6, 2, 5]] = -1.0
            layer.weight[5] *= 2
    units[FIRST].current_choice = 2
    assert units[FIRST].mutable_channel.active_segments() == ((2, 1), (5, 1))
    units[FIRST].current_choice = 4
    assert units[FIRST].mutable_channel.active_segments() == ((0, 1), (2, 1), (5, 2))


@pytest.mark.parametrize("make", [resnet18, mobilenet_v2])
def test_networks_of_the_library_run_at_any_choice(make):
    torch.manual_seed(0)
    model = make(num_classes=4)
    mutator = ChannelMutator(dict(type="L1MutableChannelUnit", default_args=dict(choice_mode="ratio", divisor=8)))
    mutator.prepare_from_supernet(model)
    assert len(mutator.mutable_units) > 3
    for _ in range(3):
        mutator.set_choices(mutator.sample_choices())
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    with pytest.raises(FastslimRuntimeError, match="pick channels that are not the first ones"):
        _ = mutator.trace


def test_a_forward_with_numbers_of_channels_is_refused():
    class Constants(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(self.conv(x).reshape(-1, 8, 64).mean(2))

    model = Constants()
    with pytest.raises(FastslimRuntimeError, match="order the channels with sort_channels"):
        prepared("mutator", model)
    assert type(model.conv) is nn.Conv2d


@pytest.mark.parametrize("layer", [nn.Conv3d(3, 8, 3), nn.Conv1d(3, 8, 3), nn.Linear(5, 8)])
def test_importance_is_the_mean_absolute_weight_of_a_channel(layer):
    weight = layer.weight.detach().double()
    expected = torch.stack([weight[channel].abs().mean() for channel in range(2, 8)])
    torch.testing.assert_close(L1MutableChannelUnit(8)._get_l1_norm(layer, 2, 8), expected)
