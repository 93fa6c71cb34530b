"""Subnets on paper, and the plain networks made of them."""

import copy
import json

import pytest
import torch
from torch import nn
from unit_cases import FIRST, SECOND, SHAPE, THIRD, Net, randomise_statistics

from fastslim.errors import FastslimFileError, FastslimRuntimeError, FastslimTypeError, FastslimValueError
from fastslim.mutators import (
    OneShotChannelMutator,
    OneShotMutableChannel,
    SequentialMutableChannel,
    export_fix_subnet,
    load_fix_subnet,
)
from fastslim.mutators.fix_subnet import deploy
from fastslim.nn import DynamicConv2d, DynamicLinear, DynamicMixin

X = torch.randn(2, *SHAPE[1:])
CHOICES = {FIRST: 4, SECOND: 9, THIRD: 2}


class Algorithm(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.architecture = randomise_statistics(Net(seed))
        units = dict(
            type="OneShotMutableChannelUnit", default_args=dict(candidate_choices=[i / 12 for i in range(1, 13)])
        )
        self.mutator = OneShotChannelMutator(units, example_inputs=SHAPE)
        self.mutator.prepare_from_supernet(self.architecture)


class Dynamic(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = DynamicConv2d(3, 8, 3), DynamicLinear(8 * 36, 4)
        mutable = OneShotMutableChannel(8, [2, 5, 8], alias="width")
        self.conv.register_mutable_attr("out_channels", mutable)
        self.fc.register_mutable_attr("in_features", mutable * 36)
        self.fc.register_mutable_attr("out_features", SequentialMutableChannel(4))

    def forward(self, x):
        return self.fc(self.conv(x).flatten(1))


def is_plain(model):
    return not any(isinstance(module, DynamicMixin) for module in model.modules())


def test_a_subnet_of_a_mutator_becomes_a_plain_network_from_paper():
    algorithm = Algorithm()
    algorithm.mutator.set_choices(CHOICES)
    subnet, nothing = export_fix_subnet(algorithm, "mutator", export_channel=True)
    plain = randomise_statistics(Net())
    load_fix_subnet(plain, json.loads(json.dumps(subnet)), load_subnet_mode="mutator")
    assert nothing is None and is_plain(plain) and type(plain) is Net and type(plain.first) is nn.Conv2d
    assert (plain.first.out_channels, plain.left.out_channels, plain.fc.in_features) == (4, 9, 44)
    torch.testing.assert_close(plain(X), algorithm.architecture(X))
    assert not any("fastslim" in str(type(value)) for m in plain.modules() for value in vars(m).values())
    copy.deepcopy(plain).load_state_dict(plain.state_dict())


def test_weights_of_a_subnet_can_be_had_at_once():
    algorithm = Algorithm()
    algorithm.mutator.set_choices(CHOICES)
    subnet, plain = export_fix_subnet(algorithm, "mutator", slice_weight=True)
    assert is_plain(plain) and subnet["channel_unit_cfg"]["units"][FIRST]["choice"] == 0.5
    torch.testing.assert_close(plain(X), algorithm.architecture(X))
    assert not is_plain(algorithm.architecture)


@pytest.mark.parametrize("as_file", [True, False])
def test_a_subnet_of_mutables_becomes_a_plain_network_from_paper(as_file, tmp_path):
    model, other = Dynamic(), Dynamic()
    model.conv.mutable_out_channels.current_choice = 5
    model.fc.mutable_out_channels.current_choice = 3
    subnet, _ = export_fix_subnet(model)
    assert {name: chosen.chosen for name, chosen in subnet.items()} == {"width": 5, "fc.mutable_attrs.out_features": 3}
    expected = model(X)
    content = json.loads(json.dumps({name: chosen._asdict() for name, chosen in subnet.items()}))
    if as_file:
        (tmp_path / "subnet.json").write_text(json.dumps(content))
        content = tmp_path / "subnet.json"
    load_fix_subnet(other, content)
    assert is_plain(other) and other.fc.weight.shape == (3, 180) and torch.equal(other(X), expected)
    _, plain = export_fix_subnet(model, slice_weight=True)
    assert is_plain(plain) and not is_plain(model) and torch.equal(plain(X), expected)


def test_names_may_have_a_prefix_on_either_side():
    for arguments, rename in (
        (dict(prefix="fc."), lambda name: name.removeprefix("fc.")),
        (dict(extra_prefix="net."), lambda name: "net." + name),
    ):
        subnet = {rename(name): chosen for name, chosen in export_fix_subnet(Dynamic())[0].items()}
        model = Dynamic()
        load_fix_subnet(model, subnet, **arguments)
        assert is_plain(model)


def test_deploying_leaves_one_subnet():
    algorithm = Algorithm()
    algorithm.mutator.set_choices(CHOICES)
    expected = algorithm.architecture(X)
    assert deploy(algorithm.mutator) is algorithm.architecture and is_plain(algorithm.architecture)
    torch.testing.assert_close(algorithm.architecture(X), expected)
    assert algorithm.mutator.mutable_units == [] and [unit.width for unit in algorithm.mutator.units[:3]] == [4, 9, 2]


class Constants(nn.Module):
    """A forward with numbers of channels in it, at the root, which narrow widths must rewrite."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.randn(8))
        self.conv, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.conv(x) * self.scale.view(1, 8, 1, 1)
        return self.fc(x.reshape(-1, 8, 64).mean(2))


def test_a_root_with_constants_in_its_forward_is_deployed_too():
    model = Constants()
    mutator = OneShotChannelMutator(dict(type="OneShotMutableChannelUnit"), example_inputs=SHAPE)
    mutator.prepare_from_supernet(model)
    mutator.set_min_choices()
    expected = model(X)
    deploy(mutator)
    torch.testing.assert_close(model(X), expected)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "scale": (4,), "conv.weight": (4, 3, 1, 1), "conv.bias": (4,), "fc.weight": (4, 4), "fc.bias": (4,)
    }  # fmt: skip
    other = copy.deepcopy(model).double()
    torch.testing.assert_close(other(X.double()).float(), expected)


def test_what_cannot_be_loaded_says_why(tmp_path):
    conv = DynamicConv2d(3, 8, 1)
    conv.register_mutable_attr("out_channels", SequentialMutableChannel(8))
    with pytest.raises(FastslimRuntimeError, match=r"use its to_static_op\(\)"):
        load_fix_subnet(conv, export_fix_subnet(conv)[0])
    with pytest.raises(FastslimRuntimeError, match="no mutable 'width'"):
        load_fix_subnet(Dynamic(), {"widht": dict(chosen=5)})
    with pytest.raises(FastslimTypeError, match="a file or a dict, got list"):
        load_fix_subnet(Dynamic(), [5])
    with pytest.raises(FastslimFileError, match="cannot be read"):
        load_fix_subnet(Dynamic(), str(tmp_path / "none.yaml"))
    with pytest.raises(FastslimRuntimeError, match="exclude each other"):
        load_fix_subnet(Dynamic(), {}, prefix="a", extra_prefix="b")
    with pytest.raises(FastslimValueError, match="channel_unit_cfg is missing"):
        load_fix_subnet(Net(), {"type": "OneShotChannelMutator"}, "mutator")
    for function in (export_fix_subnet, lambda model, mode: load_fix_subnet(model, {}, mode)):
        with pytest.raises(FastslimValueError, match="must be 'mutable' or 'mutator', got 'both'"):
            function(Dynamic(), "both")
    with pytest.raises(FastslimValueError, match="has no mutator"):
        export_fix_subnet(Dynamic(), "mutator")


def test_mutables_that_cannot_be_told_apart_need_aliases():
    model = Dynamic()
    parts = [SequentialMutableChannel(200), SequentialMutableChannel(88)]
    model.fc.register_mutable_attr("in_features", SequentialMutableChannel.derive_concat_mutable(parts))
    with pytest.raises(FastslimRuntimeError, match="follows several mutables, which need different aliases"):
        export_fix_subnet(model)
    parts[0].alias, parts[1].alias = "left", "right"
    assert set(export_fix_subnet(model)[0]) == {"width", "left", "right", "fc.mutable_attrs.out_features"}
