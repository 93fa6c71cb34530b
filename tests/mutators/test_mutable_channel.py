"""Mutables that choose channels, values, and what is derived from them."""

import copy
import pickle

import pytest
import torch

from fastslim.errors import FastslimRuntimeError, FastslimTypeError, FastslimValueError
from fastslim.mutators import (
    BaseMutable,
    DumpChosen,
    MutableChannelContainer,
    MutableValue,
    OneShotMutableChannel,
    OneShotMutableValue,
    SequentialMutableChannel,
    SimpleMutableChannel,
    SquentialMutableChannel,
)
from fastslim.mutators.derived_mutable import filled
from fastslim.registry import MODELS


def mask(*entries):
    return torch.tensor(entries, dtype=torch.bool)


@pytest.mark.parametrize(
    ("mode", "choice", "read", "active"),
    [
        ("number", 5, 5, 5),
        ("number", 0.2, 2, 2),
        ("number", 5.0, 5, 5),
        ("ratio", 0.5, 0.5, 5),
        ("ratio", 2, 0.2, 2),
        ("ratio", 0.26, 0.2, 2),
        ("ratio", 0.01, 0.1, 1),
        ("number", 0.7, 7, 7),  # 0.7 * 10 is 7.000000000000001 or less, depending on who multiplies
    ],
)
def test_choices_are_numbers_or_ratios(mode, choice, read, active):
    channel = SequentialMutableChannel(10, choice_mode=mode)
    channel.current_choice = choice
    assert channel.current_choice == read and channel.activated_channels == active
    assert torch.equal(channel.current_mask, torch.arange(10) < active)
    assert torch.equal(channel.mask, (torch.arange(10) < active).float())


@pytest.mark.parametrize("choice", [0, 11, -1, 1.5, 0.0, 12.0])
def test_choices_outside_of_the_layer_are_refused(choice):
    channel = SequentialMutableChannel(10)
    with pytest.raises(FastslimValueError, match="choose 1 to 10 channels"):
        channel.current_choice = choice
    with pytest.raises(FastslimTypeError, match="must be a number"):
        channel.current_choice = "5"
    assert channel.activated_channels == 10


def test_mmrazors_spelling_is_the_same_class():
    assert SquentialMutableChannel is SequentialMutableChannel
    assert repr(SquentialMutableChannel(4)) == "SquentialMutableChannel(num_channels=4, activated_channels=4)"
    for name in ("SquentialMutableChannel", "SequentialMutableChannel"):
        assert type(MODELS.build(dict(type=name, num_channels=4))) is SequentialMutableChannel


def test_one_shot_channels_take_only_candidates():
    channel = OneShotMutableChannel(12, [8, 4, 12])
    assert channel.candidate_choices == [4, 8, 12]
    assert (channel.min_choice, channel.max_choice, channel.current_choice, channel.num_choices) == (4, 12, 12, 3)
    channel.current_choice = 4 / 12
    assert channel.current_choice == 4 and {channel.sample_choice() for _ in range(60)} == {4, 8, 12}
    with pytest.raises(FastslimValueError, match=r"5 is no choice .* choose one of \[4, 8, 12\]"):
        channel.current_choice = 5
    thirds = OneShotMutableChannel(12, [1 / 3, 2 / 3, 1.0], choice_mode="ratio")
    thirds.current_choice = 0.1 + 0.7 / 3
    assert thirds.activated_channels == 4 and thirds.current_choice == 4 / 12
    assert OneShotMutableChannel(12).candidate_choices == [12]
    assert OneShotMutableChannel(12, choice_mode="ratio").candidate_choices == [1.0]
    with pytest.raises(FastslimValueError, match="13 is no choice"):
        OneShotMutableChannel(12, [13])


def test_candidates_of_the_caller_stay_as_they_are():
    listed = [12, 4]
    OneShotMutableChannel(12, listed)
    OneShotMutableChannel(12)
    assert listed == [12, 4] and OneShotMutableChannel(6).candidate_choices == [6]


def test_simple_channels_choose_any_mask():
    channel = SimpleMutableChannel(4)
    channel.current_choice = mask(1, 0, 0, 1)
    assert channel.activated_channels == 2 and torch.equal(channel.current_mask, mask(1, 0, 0, 1))
    assert channel.dump_chosen() == DumpChosen([1, 0, 0, 1], {"max_channels": 4})
    for wrong, got in ((torch.ones(3), r"\(3,\)"), (2, "int")):
        with pytest.raises(FastslimValueError, match=f"a mask with 4 entries, got {got}"):
            channel.current_choice = wrong
    other = SimpleMutableChannel(4)
    other.fix_chosen(channel.dump_chosen().chosen)
    assert torch.equal(other.current_mask, channel.current_mask)


def test_fixing_is_final():
    channel = SequentialMutableChannel(4)
    channel.fix_chosen(3)
    assert channel.is_fixed and channel.dump_chosen() == DumpChosen(chosen=3, meta={"max_channels": 4})
    with pytest.raises(FastslimRuntimeError, match="fixed already"):
        channel.fix_chosen()
    with pytest.raises(FastslimRuntimeError, match="fixed already"):
        channel.is_fixed = False
    with pytest.raises(FastslimTypeError, match="True or False"):
        SequentialMutableChannel(4).is_fixed = 1
    with pytest.raises(FastslimValueError, match="positive whole number"):
        SequentialMutableChannel(0)
    with pytest.raises(FastslimValueError, match="'number' or 'ratio'"):
        SequentialMutableChannel(4, "share")


def test_what_was_dumped_fixes_a_mutable():
    channel, value = SquentialMutableChannel(10), OneShotMutableValue([2, 3, 4])
    channel.current_choice, value.current_choice = 3, 2
    for mutable, chosen in ((channel, 3), (value, 2)):
        dumped = mutable.dump_chosen()
        mutable.current_choice = 4
        mutable.fix_chosen(dumped)
        assert mutable.is_fixed
        assert mutable.current_choice == chosen


def test_a_value_that_is_no_choice_is_refused_as_mmrazor_does():
    value = MutableValue([2, 3, 4])
    for kind in (ValueError, AssertionError):
        with pytest.raises(kind, match=r"5 is no choice .* choose one of \[2, 3, 4\]"):
            value.fix_chosen(5)
    assert not value.is_fixed


def test_mutables_are_no_part_of_a_state_dict():
    for mutable in (SequentialMutableChannel(4), SimpleMutableChannel(4), OneShotMutableChannel(4)):
        assert isinstance(mutable, BaseMutable) and not mutable.state_dict() and not list(mutable.parameters())


def test_a_container_holds_ranges_and_fills_gaps():
    container = MutableChannelContainer(10)
    assert container.current_mask.all() and len(container.current_mask) == 10
    first, last = SequentialMutableChannel(4), SequentialMutableChannel(2)
    container.register_mutable(last, 8, 10)
    container.register_mutable(first, 0, 4)
    assert list(container.mutable_channels) == [(0, 4), (8, 10)]
    first.current_choice, last.current_choice = 1, 1
    assert torch.equal(container.current_choice, mask(1, 0, 0, 0, 1, 1, 1, 1, 1, 0))
    assert container.active_segments() == ((0, 1), (4, 4), (8, 1))
    assert torch.equal(filled(10, container.active_segments()), container.current_mask)
    first.fix_chosen()
    assert not container.is_fixed
    last.fix_chosen()
    assert container.is_fixed
    with pytest.raises(FastslimRuntimeError, match="no choice of its own"):
        container.current_choice = first.current_mask
    with pytest.raises(FastslimRuntimeError, match="fix those"):
        container.is_fixed = True
    for start, end, message in (
        (8, 12, "do not fit 10"),
        (4, 7, "mutable of 4 channels does not fit"),
        (2, 6, "overlap 0 to 4"),
    ):
        with pytest.raises(FastslimValueError, match=message):
            container.register_mutable(SequentialMutableChannel(4), start, end)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda values: pickle.loads(pickle.dumps(values))])
def test_copies_are_independent_and_keep_what_they_share(make_copy):
    channel, container = SequentialMutableChannel(4), MutableChannelContainer(12)
    twice = channel * 2
    container.register_mutable(channel, 0, 4)
    container.register_mutable(twice, 4, 12)
    other, other_twice, other_container = make_copy((channel, twice, container))
    other.current_choice = 1
    assert other_twice.current_choice == 2 and other_container.activated_channels == 3
    assert twice.current_choice == 8 and container.activated_channels == 12
