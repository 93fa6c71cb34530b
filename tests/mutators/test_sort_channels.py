"""`fastslim.sort_channels`: the same function at full width, the important channels first."""

from __future__ import annotations

import warnings

import pytest
import torch
from sort_cases import CASES, IMAGE, Residual, conv_bn, make
from torch import nn

import fastslim
from fastslim.errors import FastslimRuntimeError, FastslimTypeError, FastslimValueError
from fastslim.graph import trace
from fastslim.mutators import SlimmableChannelMutator, mutator_of
from fastslim.mutators.importance import granule_importance


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("importance", ["l1", "l2", "bn"])
@pytest.mark.parametrize("name", CASES)
def test_the_network_computes_the_same_and_importance_descends(name, importance):
    model, x = make(name)
    keys, held = list(model.state_dict()), [*model.parameters(), *model.buffers()]
    before, old = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    orders = fastslim.sort_channels(model, x, importance)
    assert (model(x) - before).abs().max() <= 1e-12 * before.abs().max().clamp(min=1)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(held, [*model.parameters(), *model.buffers()], strict=True))
    assert any(not torch.equal(value, old[key]) for key, value in model.state_dict().items())
    found = trace(model, x)
    sortable = {unit.name for unit in found.units if unit.mutable}
    assert sortable and set(orders) == sortable
    for unit, values in granule_importance(found, importance).items():
        if found.units[unit].mutable:
            assert (values.diff() <= 1e-12).all()


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_the_old_one_in_the_returned_order(name):
    model, x = make(name)
    found, old = trace(model, x), {key: value.clone() for key, value in model.state_dict().items()}
    orders = fastslim.sort_channels(model, x)
    for key, value in model.state_dict().items():
        expected = old[key]
        for dim, parts in enumerate(found.tensors[key]):
            index, start = [], 0
            for unit, entries in parts:
                order = list(range(entries))
                if unit is not None and (spec := found.units[unit]).name in orders:
                    granules = orders[spec.name][:: spec.granularity] // spec.granularity
                    each = entries // len(granules)
                    order = [granule * each + i for granule in granules.tolist() for i in range(each)]
                index += [start + i for i in order]
                start += entries
            expected = expected.index_select(dim, torch.tensor(index))
        assert torch.equal(value, expected), key


def three_layers(first: list[float], gamma: list[float] | None = None) -> nn.Sequential:
    """conv -> (norm) -> conv, the rows of the first weight with entries of these sizes, signs in turn."""
    model = nn.Sequential(
        nn.Conv2d(3, len(first), 1), nn.BatchNorm2d(len(first)), nn.ReLU(), nn.Conv2d(len(first), 2, 1)
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(first)[:, None, None, None] * torch.tensor([1, -1, 1])[:, None, None])
        if gamma is not None:
            model[1].weight.copy_(torch.tensor(gamma))
    return model.eval()


def test_all_tensors_of_a_unit_move():
    model = three_layers([1.0, 4.0, 2.0, 3.0], [0.1, 0.2, 0.3, 0.4])
    model[1].running_mean.copy_(torch.arange(4.0))
    last = model[3].weight.clone()
    orders = fastslim.sort_channels(model, IMAGE)
    assert {name: order.tolist() for name, order in orders.items()} == {"0_(0, 4)_4": [1, 3, 2, 0]}
    assert model[0].weight[:, 0, 0, 0].tolist() == [4, 3, 2, 1]
    assert model[1].running_mean.tolist() == [1, 3, 2, 0]
    assert torch.equal(model[1].weight, torch.tensor([0.2, 0.4, 0.3, 0.1]))
    assert torch.equal(model[3].weight, last[:, [1, 3, 2, 0]])


def test_importances():
    model = three_layers([1.0, 1.0, 1.0, 1.0], [0.1, -0.4, 0.3, 0.2])
    with torch.no_grad():
        model[0].weight[2, :, 0, 0] = torch.tensor([2.5, 0, 0])  # L1 2.5 < 3, L2 2.5 > 1.7
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = {"l1": [0, 1, 3, 2], "l2": [2, 0, 1, 3], "bn": [1, 2, 3, 0]}
    for importance, order in expected.items():
        model.load_state_dict(state)
        assert fastslim.sort_channels(model, IMAGE, importance)["0_(0, 4)_4"].tolist() == order


def test_units_without_a_norm_fall_back_to_l1():
    torch.manual_seed(0)
    model = nn.Sequential(conv_bn(3, 8), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    orders = fastslim.sort_channels(model, IMAGE, "bn")
    assert orders["0.0_(0, 8)_8"].tolist() == list(range(8))  # all scales are 1
    assert (model[1].weight.abs().sum((1, 2, 3)).diff() <= 1e-6).all()
    assert orders["1_(0, 8)_8"].tolist() != list(range(8))


@pytest.mark.parametrize(("name", "module", "together"), [("FusedAttention", "qkv", 4), ("Grouped", "stem", 8)])
def test_heads_and_groups_move_as_a_whole(name, module, together):
    model, x = make(name)
    order = next(order for unit, order in fastslim.sort_channels(model, x).items() if unit.startswith(module))
    runs = order.view(-1, together)
    assert torch.equal(runs, runs[:, :1] + torch.arange(together)) and (runs[:, 0] % together == 0).all()


def test_sorting_twice_changes_nothing_more():
    model, x = make("Residual")
    fastslim.sort_channels(model, x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    orders = fastslim.sort_channels(model, x)
    assert all(order.tolist() == list(range(len(order))) for order in orders.values())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("importance", ["l1", "l2"])
def test_half_the_network_is_nearer_to_the_whole_after_sorting(importance):
    def error(model: nn.Module, x: torch.Tensor) -> float:
        mutator = mutator_of(model)
        full = model(x)
        mutator.set_choices(mutator.uniform_choices(0.5))
        error = (model(x) - full).norm() / full.norm()
        mutator.set_max_choices()
        return float(error)

    before, after = [], []
    for seed in range(8):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)]
        model, x = nn.Sequential(*layers).eval(), torch.randn(IMAGE)
        with torch.no_grad():  # as after training: some channels hardly matter
            for layer in layers[:3:2]:
                layer.weight.mul_(2.0 ** -torch.randperm(16)[:, None, None, None])
                layer.bias.zero_()
        fastslim.convert(model, x)
        with torch.no_grad():
            before.append(error(model, x))
            fastslim.sort_channels(model, importance=importance)
            after.append(error(model, x))
    assert max(after) < 0.02 < min(before)


def test_converted_networks_and_algorithms_are_sorted_as_plain_ones():
    plain, x = make("Residual")
    orders = fastslim.sort_channels(plain, x)
    for form in ("converted", "mutator", "algorithm"):
        model, _ = make("Residual")
        mutator = fastslim.convert(model, x).mutator
        mutator.set_min_choices()
        source = {"converted": model, "mutator": mutator, "algorithm": fastslim.AutoSlim(architecture=model)}[form]
        chosen = mutator.current_choices
        own = fastslim.sort_channels(source)
        assert own.keys() == orders.keys() and all(torch.equal(own[name], orders[name]) for name in own)
        assert mutator.current_choices == chosen and model.a[0].active_out == 8
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_subnets_that_never_reach_the_full_width_are_sorted_too():
    model, x = make("Residual")
    mutator = fastslim.convert(model, x, choices=[0.25, 0.5], divisor=1).mutator
    assert len(fastslim.sort_channels(model)) == 2
    assert mutator.current_choices == mutator.max_choices


class Between(nn.Module):
    """Something between two layers, in a branch that a layer scale keeps from the output."""

    def __init__(self, between, scale: float = 1.0) -> None:
        super().__init__()
        self.first, self.a, self.b, self.last = (nn.Linear(*io) for io in ((3, 8), (8, 16), (16, 8), (8, 2)))
        self.between, self.scale = between, scale
        self.constant = torch.linspace(-1, 1, 16)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.scale * self.b(self.between(self.a(x), self)))


@pytest.mark.parametrize("scale", [1.0, 1e-9])
@pytest.mark.parametrize(
    "between",
    [
        lambda x, model: x.cumsum(-1),
        lambda x, model: x * model.constant,
        lambda x, model: x + torch.randn_like(x),
        lambda x, model: nn.functional.local_response_norm(x[..., None], 3, alpha=1.0)[..., 0],
    ],
    ids=["cumsum", "constant", "noise", "neighbours"],
)
def test_units_whose_order_matters_keep_it(between, scale):
    torch.manual_seed(0)
    model, x = Between(between, scale).eval(), torch.randn(4, 3)
    weight = model.a.weight.clone()
    with pytest.warns(UserWarning, match=r"1 of 2 units keep the order .*: a_\(0, 16\)_16"):
        orders = fastslim.sort_channels(model, x)
    assert list(orders) == ["first_(0, 8)_8"]
    assert torch.equal(model.a.weight, weight[:, orders["first_(0, 8)_8"]])


def test_channels_behind_a_shuffle_and_full_ones_keep_their_order():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ChannelShuffle(2), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 4, 1)).eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert list(fastslim.sort_channels(model, IMAGE)) == ["2_(0, 8)_8"]
    assert torch.equal(model[0].weight, state["0.weight"])
    assert not torch.equal(model[3].weight, state["3.weight"])


def test_an_error_on_the_way_leaves_the_model_as_it_was():
    class Failing(Residual):
        calls = 0

        def forward(self, x):
            Failing.calls += 1
            if Failing.calls == 4:  # two for the trace, one before sorting
                raise KeyError("no more")
            return super().forward(x)

    model = Failing()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(KeyError):
        fastslim.sort_channels(model, IMAGE)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_what_is_refused():
    with pytest.raises(FastslimValueError, match="importance='l3' is unknown; known: bn, l1, l2"):
        fastslim.sort_channels(Residual(), IMAGE, "l3")
    with pytest.raises(FastslimTypeError, match="Residual is not converted, so example_inputs are needed"):
        fastslim.sort_channels(Residual())
    with pytest.raises(FastslimTypeError, match=r"torch\.nn\.Module, but got Tensor"):
        fastslim.sort_channels(torch.zeros(3), IMAGE)
    mutator = SlimmableChannelMutator(example_inputs=IMAGE)
    mutator.prepare_from_supernet(Residual())
    with pytest.raises(FastslimRuntimeError, match="sort the plain model first"):
        fastslim.sort_channels(mutator)
