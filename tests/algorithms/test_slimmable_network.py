"""SlimmableNetwork: listed subnets trained together, each with its own batch norm, and one of them deployed."""

from __future__ import annotations

import copy
import json
import warnings

import plain_loop
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastslim
from fastslim.algorithms import SlimmableNetwork
from fastslim.mutators import OneShotChannelMutator, SlimmableChannelMutator
from fastslim.nn import SwitchableBatchNorm2d

WIDTHS = [0.25, 0.5, 1.0]
UNITS = dict(
    type="SlimmableChannelMutator",
    channel_unit_cfg=dict(
        type="SlimmableChannelUnit", default_args=dict(candidate_choices=WIDTHS, choice_mode="ratio", divisor=4)
    ),
    parse_cfg=dict(type="ChannelAnalyzer", demo_input=(1, 3, 16, 16)),
)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def make(**options) -> tuple[SlimmableNetwork, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    plain = network().double()
    images, labels = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.randint(0, 10, (6,))
    algo = SlimmableNetwork(copy.deepcopy(plain), copy.deepcopy(UNITS), example_inputs=images[:1], **options)
    return algo, plain, images, labels


def by_hand(plain: nn.Module, norms: dict[int, list[nn.BatchNorm2d]], images: Tensor, index: int) -> Tensor:
    """The index-th subnet's logits, with `norms[position][index]` in the place of its batch norms."""
    a, b = (round(n * WIDTHS[index]) for n in (16, 32))
    x = F.relu(norms[1][index](F.conv2d(images, plain[0].weight[:a], None, 1, 1)))
    x = F.relu(norms[4][index](F.conv2d(x, plain[3].weight[:b, :a], None, 2, 1)))
    return F.linear(x.mean((2, 3)), plain[8].weight[:, :b], plain[8].bias)


def test_a_step_equals_the_loop_over_the_listed_subnets() -> None:
    algo, plain, images, labels = make()
    norms = {p: [nn.BatchNorm2d(round(plain[p].num_features * w)).double() for w in WIDTHS] for p in (1, 4)}
    own = nn.ModuleList([plain, *norms[1][:2], *norms[4][:2]])
    norms[1][2], norms[4][2] = plain[1], plain[4]  # the full width's
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, 0.9) for m in (algo, own)]
    for _ in range(3):
        losses = algo.train_step((images, labels), optimizers[0])
        optimizers[1].zero_grad()
        expected = {}
        for index in range(3):
            loss = F.cross_entropy(by_hand(plain, norms, images, index), labels)
            loss.backward()
            expected[f"subnet_{index}.loss"] = loss.detach()
        optimizers[1].step()
        assert losses.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(losses[name], value, rtol=0, atol=1e-12)
    for position in (0, 3, 8):
        torch.testing.assert_close(algo.architecture[position].weight, plain[position].weight, rtol=0, atol=1e-12)
    for position in (1, 4):
        for index, width in enumerate(WIDTHS[:2]):
            channels = round(plain[position].num_features * width)
            mine = algo.architecture[position].candidate_bn[str(channels)].state_dict()
            for key, value in norms[position][index].state_dict().items():
                torch.testing.assert_close(mine[key], value, rtol=0, atol=1e-12, msg=f"{position}, {width}, {key}")


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_deployed_network_is_the_listed_subnet_of_exactly_its_size(index) -> None:
    algo, plain, images, labels = make()
    for _ in range(2):
        algo.train_step((images, labels), torch.optim.SGD(algo.parameters(), 0.1))
    algo.eval().mutator.set_choices(algo.mutator.subnets[index])
    with warnings.catch_warnings():  # every width has statistics of its own: there is nothing to calibrate
        warnings.simplefilter("error")
        expected = algo(images)
    deployed = SlimmableNetwork(network().double(), copy.deepcopy(UNITS), index, example_inputs=images[:1])
    assert deployed.is_deployed and not algo.is_deployed
    a, b = (round(n * WIDTHS[index]) for n in (16, 32))
    assert deployed.architecture[3].weight.shape == (b, a, 3, 3)
    assert not any(isinstance(m, SwitchableBatchNorm2d) and len(m.candidate_bn) for m in deployed.modules())
    assert deployed.architecture.state_dict().keys() == plain.state_dict().keys()
    exported = fastslim.export_subnet(algo, algo.mutator.subnets[index])
    deployed.architecture.load_state_dict(exported.state_dict())
    deployed.norm_training = False
    torch.testing.assert_close(deployed.eval().architecture(images), expected)


def test_a_deployed_network_trains_as_an_ordinary_one() -> None:
    algo, _, images, labels = make(deploy_index=1)
    plain = fastslim.export_subnet(algo)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, 0.9) for m in (algo, plain)]
    for _ in range(3):
        losses = algo.train_step((images, labels), optimizers[0])
        optimizers[1].zero_grad()
        loss = F.cross_entropy(plain(images), labels)
        loss.backward()
        optimizers[1].step()
        assert list(losses) == ["loss"]
        torch.testing.assert_close(losses["loss"], loss.detach(), rtol=0, atol=1e-12)
    for mine, theirs in zip(algo.architecture.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_subnets_come_from_a_file_as_well(tmp_path) -> None:
    algo, *_ = make()
    path = tmp_path / "subnets.json"
    path.write_text(json.dumps(algo.mutator.config_template(with_unit_init_cfg=True)))
    again = SlimmableNetwork(
        network(), dict(type="SlimmableChannelMutator", channel_unit_cfg=str(path)), input_shape=(1, 3, 16, 16)
    )
    assert again.mutator.subnets == algo.mutator.subnets
    assert again.num_subnet == 3


def test_it_works_with_nothing_but_an_architecture() -> None:
    algo = SlimmableNetwork(plain_loop.ConcatNet(), input_shape=(1, 3, 12, 12))
    losses = algo.train_step(
        (torch.randn(4, 3, 12, 12), torch.tensor([1, 2, 3, 4])), torch.optim.SGD(algo.parameters(), 0.1)
    )
    assert list(losses) == [f"subnet_{i}.loss" for i in range(4)]


def test_copies_train_on() -> None:
    algo, _, images, labels = make()
    algo.train_step((images, labels), torch.optim.SGD(algo.parameters(), 0.1))
    both = (algo, copy.deepcopy(algo))
    results = [a.train_step((images, labels), torch.optim.SGD(a.parameters(), 0.1)) for a in both]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(deploy_index=3), ValueError, "deploy_index=3: choose one of the 3 subnets, 0 to 2, or -1"),
        (dict(mutator=OneShotChannelMutator()), TypeError, "`SlimmableChannelMutator` instance, but got"),
        (dict(mutator=3), TypeError, "mutator should be a `dict` or `SlimmableChannelMutator` instance"),
        (dict(architecture=None), TypeError, "architecture should be"),
    ],
)
def test_bad_arguments_are_named(options, error, message) -> None:
    with pytest.raises(error, match=message):
        SlimmableNetwork(**{"architecture": network(), "mutator": copy.deepcopy(UNITS), **options})


def test_a_prepared_mutator_is_taken_as_it_is() -> None:
    net = network()
    mutator = SlimmableChannelMutator(UNITS["channel_unit_cfg"], UNITS["parse_cfg"])
    mutator.prepare_from_supernet(net)
    assert SlimmableNetwork(net, mutator).mutator is mutator
