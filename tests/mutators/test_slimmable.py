"""A fixed list of subnets, each with batch-norm statistics of its own."""

import json

import pytest
import torch
from torch import nn

from fastslim.errors import FastslimFileError, FastslimTypeError, FastslimValueError
from fastslim.mutators import OneShotMutableChannelUnit, SlimmableChannelMutator
from fastslim.nn import SwitchableBatchNorm2d

SHAPE = (1, 3, 8, 8)
FIRST, SECOND = "0_(0, 48)_48", "3_(0, 96)_96"


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 48, 3, padding=1),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.Conv2d(48, 96, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6144, 10),
    )


def prepared(model=None, **kwargs):
    mutator = SlimmableChannelMutator(example_inputs=SHAPE, **kwargs)
    mutator.prepare_from_supernet(network() if model is None else model)
    return mutator


def test_slimmable_mutator_has_statistics_for_every_width():
    model = network()
    mutator = prepared(model)
    assert mutator.subnets == [
        {FIRST: 16, SECOND: 24},
        {FIRST: 24, SECOND: 48},
        {FIRST: 40, SECOND: 72},
        {FIRST: 48, SECOND: 96},
    ]
    assert isinstance(model[1], SwitchableBatchNorm2d)
    for subnet in mutator.subnets:
        mutator.set_choices(subnet)
        model(torch.randn(2, 3, 8, 8))
    assert set(map(int, model[1].candidate_bn)) == {s[FIRST] for s in mutator.subnets} - {48}
    assert mutator.sample_choices() in mutator.subnets


def test_slimmable_mutator_reads_subnets_from_lists_and_files(tmp_path):
    subnets = [{FIRST: 10, SECOND: 96}, {FIRST: 48, SECOND: 20}, {FIRST: 10, SECOND: 30}]
    mutator = prepared(channel_unit_cfg=subnets)
    assert mutator.subnets == subnets
    file = tmp_path / "units.json"
    file.write_text(json.dumps(mutator.config_template(with_unit_init_cfg=True)))
    again = prepared(channel_unit_cfg=str(file))
    assert again.subnets == subnets
    file.write_text("{")
    with pytest.raises(FastslimFileError, match="is no JSON"):
        SlimmableChannelMutator(str(file))
    with pytest.raises(FastslimFileError, match="cannot be read"):
        SlimmableChannelMutator(str(tmp_path / "none.json"))
    with pytest.raises(FastslimValueError, match="lists 2 widths, but others list 3"):
        prepared(
            channel_unit_cfg=dict(
                type="SlimmableChannelUnit",
                default_args=dict(candidate_choices=[0.25, 0.5, 1.0], choice_mode="ratio"),
                units={FIRST: dict(init_args=dict(candidate_choices=[0.5, 1.0]))},
            ),
        )


def test_subnets_of_a_config_are_known_before_there_is_a_supernet():
    subnets = [{FIRST: 10, SECOND: 96}, {FIRST: 48, SECOND: 20}]
    assert SlimmableChannelMutator(subnets).subnets == subnets
    assert SlimmableChannelMutator().subnets == []


def test_other_units_are_refused():
    with pytest.raises(FastslimTypeError, match="needs SlimmableChannelUnit, got OneShotMutableChannelUnit"):
        SlimmableChannelMutator(OneShotMutableChannelUnit)
