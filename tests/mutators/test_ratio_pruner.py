"""MMRazor 0.x's pruner: ratios, channel_cfg, deploying, switchable batch norms."""

import copy
import json

import pytest
import torch
import yaml
from torch import nn
from unit_cases import FIRST, SECOND, SHAPE, THIRD, Net, randomise_statistics

from fastslim.errors import FastslimFileError, FastslimTypeError, FastslimValueError
from fastslim.mutators import RatioPruner
from fastslim.nn import IndexedBatchNorm2d, SlimLayer
from fastslim.registry import MODELS

RATIOS = (0.25, 0.5, 0.8, 1.0)
X = torch.randn(2, *SHAPE[1:])


def prepared(model=None, ratios=RATIOS, **arguments):
    pruner = RatioPruner(ratios, example_inputs=SHAPE, **arguments)
    model = randomise_statistics(Net()) if model is None else model
    pruner.prepare_from_supernet(model)
    return pruner, model


def test_spaces_take_the_first_rounded_channels():
    pruner, model = prepared(ratios=[1.0, 0.01, 0.3, 0.45])
    assert pruner.ratios == [0.01, 0.3, 0.45, 1.0] and pruner.channel_bins == 4
    assert {unit.name: unit.candidate_widths for unit in pruner.mutable_units} == {
        FIRST: (1, 2, 4, 8), SECOND: (1, 4, 5, 12), THIRD: (1, 2, 3, 6)
    }  # fmt: skip
    assert pruner.channel_spaces == {FIRST: 8, SECOND: 12, THIRD: 6}
    pruner.set_min_channel()
    assert pruner.current_choices == {FIRST: 1, SECOND: 1, THIRD: 1} and model.first(X).shape[1] == 1
    pruner.set_max_channel()
    assert pruner.current_choices == pruner.channel_spaces
    pruner.set_subnet({FIRST: 0.3, SECOND: 5, THIRD: 0.45})
    assert pruner.current_choices == {FIRST: 2, SECOND: 5, THIRD: 3}
    pruner.set_subnet(pruner.sample_subnet())
    assert model(X).shape == (2, 5)


def test_layers_know_their_space():
    pruner, _ = prepared(except_start_keys=["right"])
    assert pruner.get_space_id("first") == pruner.get_space_id("depthwise") == FIRST
    assert pruner.get_space_id("joined") == {"concat": [SECOND, None]}
    assert pruner.get_space_id("fc") is None and pruner.get_space_id("right") is None
    with pytest.raises(FastslimValueError, match="did you mean 'first'"):
        pruner.get_space_id("frst")


def test_the_head_of_mmrazors_classifiers_stays_by_default():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten())
            self.head = nn.ModuleDict({"fc": nn.Linear(512, 8), "last": nn.Linear(8, 2)})

        def forward(self, x):
            return self.head["last"](self.head["fc"](self.backbone(x)))

    pruner, _ = prepared(Classifier())
    assert list(pruner.channel_spaces) == ["backbone.0_(0, 8)_8"]
    assert len(prepared(Classifier(), except_start_keys=None)[0].channel_spaces) == 2


def test_bins_choose_ratios():
    pruner, _ = prepared()
    assert pruner.get_max_channel_bins() == {FIRST: 4, SECOND: 4, THIRD: 4}
    pruner.set_channel_bins({FIRST: 1, SECOND: torch.tensor([1, 1, 0, 0]), THIRD: [1, 1, 1, 0]})
    assert pruner.current_choices == {FIRST: 2, SECOND: 6, THIRD: 5}
    pruner.set_channel_bins(pruner.get_max_channel_bins(10), 10)
    assert pruner.current_choices == pruner.max_choices
    pruner.set_channel_bins({FIRST: 5}, 10)
    assert pruner.current_choices == {FIRST: 4, SECOND: 12, THIRD: 6}
    with pytest.raises(FastslimValueError, match="choose 1 to 4"):
        pruner.set_channel_bins({FIRST: 5})
    with pytest.raises(FastslimValueError, match="no space is called"):
        pruner.set_channel_bins({"first": 1})


def test_the_exported_subnet_names_every_layers_channels():
    pruner, _ = prepared()
    pruner.set_subnet({FIRST: 4, SECOND: 6, THIRD: 5})
    config = pruner.export_subnet()
    assert config["first"] == dict(in_channels=3, raw_in_channels=3, out_channels=4, raw_out_channels=8)
    assert config["depthwise"] == dict(in_channels=4, raw_in_channels=8, out_channels=4, raw_out_channels=8)
    assert config["joined"] == dict(out_channels=11, raw_out_channels=18)
    assert config["fc"] == dict(in_channels=44, raw_in_channels=72, out_channels=5, raw_out_channels=5)
    assert set(config) == {"first", "bn", "same", "depthwise", "left", "right", "joined", "fc"}


@pytest.mark.parametrize("form", ["dict", "json", "yaml"])
def test_deploying_makes_a_plain_network_that_computes_the_same(form, tmp_path):
    pruner, model = prepared()
    pruner.set_subnet({FIRST: 4, SECOND: 6, THIRD: 5})
    expected, config = model(X), pruner.export_subnet()
    if form != "dict":
        file = tmp_path / f"subnet.{form}"
        file.write_text(json.dumps(config) if form == "json" else yaml.safe_dump(config))
        config = file
    fresh = randomise_statistics(Net())
    for network, own in ((model, pruner), (fresh, RatioPruner(RATIOS, example_inputs=SHAPE))):
        assert own.deploy_subnet(network, config) is network
        assert not any(isinstance(module, SlimLayer) for module in network.modules())
        assert network.first.out_channels == network.depthwise.groups == 4 and network.joined.num_features == 11
        torch.testing.assert_close(network(X), expected)
        assert own.mutable_units == [] and own.export_subnet()["left"]["out_channels"] == 6
    network.train()(X).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_widths_of_a_channel_cfg_need_not_be_ratios():
    pruner, model = prepared(except_start_keys=["right"])
    config = pruner.export_subnet()
    config["left"]["out_channels"] = 7
    pruner.switch_subnet(config)
    assert pruner.current_choices == {FIRST: 8, SECOND: 7} and model.left(torch.randn(1, 8, 2, 2)).shape[1] == 7
    pruner.set_choices(pruner.current_choices)
    expected = model(X)
    torch.testing.assert_close(pruner.deploy_subnet(model, config)(X), expected)
    assert model.left.out_channels == 7


@pytest.mark.parametrize("fixed", [True, False])
def test_its_template_makes_a_mutator_with_the_same_units(fixed):
    pruner, _ = prepared(except_start_keys=["right"])
    pruner.set_subnet({FIRST: 2, SECOND: 10})
    if fixed:
        pruner.fix_channel_mutables()
    config = json.loads(json.dumps(pruner.config_template(with_unit_init_cfg=True)))
    again = MODELS.build(config)
    again.prepare_from_supernet(Net())
    assert [unit.candidate_widths for unit in again.units] == [unit.candidate_widths for unit in pruner.units]
    assert [unit.width for unit in again.units] == [2, 10, 6, 5]


def test_an_algorithm_is_pruned_at_its_architecture():
    class Algorithm(nn.Module):
        def __init__(self):
            super().__init__()
            self.architecture = Net()

    pruner, algorithm = prepared(Algorithm())
    assert pruner.is_prepared_for(algorithm.architecture)
    with pytest.raises(FastslimValueError, match="another supernet"):
        pruner.deploy_subnet(Algorithm(), pruner.export_subnet())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda config: config.pop("left"), FastslimValueError, "says nothing of space 'left"),
        (lambda config: config.update(lefty=config["left"]), FastslimValueError, "did you mean 'left'"),
        (lambda config: config["left"].update(raw_out_channels=24), FastslimValueError, "of another network"),
        (lambda config: config["left"].update(out_channels=13), FastslimValueError, "cannot have 13 channels"),
        (lambda config: config["same"].update(out_channels=2), FastslimValueError, "must have as many: 'same'"),
        (lambda config: config["left"].clear(), FastslimValueError, "must be a dict with 'out_channels'"),
    ],
)
def test_a_channel_cfg_that_does_not_fit_changes_nothing(change, error, message):
    pruner, model = prepared()
    config = pruner.export_subnet()
    pruner.set_subnet({FIRST: 4})
    change(config)
    for use in (pruner.switch_subnet, lambda given: pruner.deploy_subnet(model, given)):
        with pytest.raises(error, match=message):
            use(config)
    assert pruner.current_choices == {FIRST: 4, SECOND: 12, THIRD: 6}
    with pytest.raises(FastslimTypeError, match="from layer to channels, got list"):
        pruner.switch_subnet([config])
    with pytest.raises(FastslimFileError, match="cannot be read"):
        pruner.switch_subnet("none.yaml")


def test_each_subnet_has_batch_norms_of_its_own():
    model = randomise_statistics(Net())
    full = model(X)
    pruner = RatioPruner(RATIOS, example_inputs=SHAPE)
    assert pruner.convert_switchable_bn(model, 3) is model and isinstance(model.bn, IndexedBatchNorm2d)
    assert set(Net().state_dict()) <= set(model.state_dict())
    pruner.prepare_from_supernet(model)
    torch.testing.assert_close(model(X), full)
    subnets = []
    for widths in ({FIRST: 2, SECOND: 6, THIRD: 5}, {FIRST: 4, SECOND: 12, THIRD: 6}, {FIRST: 8, SECOND: 3, THIRD: 2}):
        pruner.set_subnet(widths)
        subnets.append(pruner.export_subnet())
    sets = [model.bn, *model.bn.further_bns]
    model.train()
    before = [bn.running_mean.clone() for bn in sets]
    for index, subnet in enumerate(subnets):
        pruner.switch_subnet(subnet, index)
        assert model.bn.index == model.joined.index == index
        model(X)
        changed = [not torch.equal(bn.running_mean, old) for bn, old in zip(sets, before, strict=True)]
        assert changed == [i <= index for i in range(3)]
    width = subnets[1]["bn"]["out_channels"]
    assert torch.equal(sets[1].running_mean[width:], before[1][width:])
    pruner.switch_subnet(subnets[1], 1)
    expected = model.eval()(X)
    pruner.switch_subnet(subnets[0], 0)
    assert not torch.allclose(model(X), expected)
    pruner.switch_subnet(subnets[1], 1)
    other = copy.deepcopy({"pruner": pruner, "model": model})
    assert torch.equal(other["model"](X), expected)
    other["pruner"].deploy_subnet(other["model"], subnets[1])
    torch.testing.assert_close(other["model"](X), expected)
    assert type(other["model"].bn) is nn.BatchNorm2d and torch.equal(model(X), expected)
    with pytest.raises(FastslimValueError, match="subnet 3 has no set; choose 0 to 2"):
        pruner.switch_subnet(subnets[1], 3)
    assert type(pruner.convert_switchable_bn(nn.BatchNorm2d(4), 2)) is IndexedBatchNorm2d
    with pytest.raises(FastslimValueError, match="num_bns must be a positive"):
        pruner.convert_switchable_bn(Net(), 0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(ratios=0.5), FastslimTypeError, "ratios must be a list of numbers, got float"),
        (dict(ratios=[]), FastslimValueError, "ratios is empty"),
        (dict(ratios=[0.5], except_start_keys="head"), FastslimTypeError, "must be a list of names"),
    ],
)
def test_bad_arguments_name_the_fix(arguments, error, message):
    with pytest.raises(error, match=message):
        RatioPruner(**arguments)
