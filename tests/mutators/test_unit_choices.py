"""Which widths a unit may take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastslim.errors import FastslimTypeError, FastslimValueError
from fastslim.graph import UnitSpec
from fastslim.mutators import OneShotMutableChannelUnit, SequentialMutableChannelUnit, SlimmableChannelUnit
from fastslim.mutators.units import round_width


@pytest.mark.parametrize(
    ("asked", "channels", "divisor", "width"),
    [
        (10.7, 64, 8, 16),  # 8 is less than 0.9 of 10.7
        (12, 64, 8, 16),
        (27, 64, 8, 32),
        (28.9, 64, 8, 32),
        (33, 64, 8, 32),
        (1, 64, 8, 8),
        (63, 100, 8, 64),
        (99, 100, 8, 96),
        (98, 98, 8, 98),  # the full width is always there
        (3, 6, 8, 6),  # smaller than the divisor: stays full
        (2.5, 10, 1, 3),
    ],
)
def test_rounding(asked, channels, divisor, width):
    assert round_width(asked, channels, divisor) == width


@given(
    channels=st.integers(1, 500),
    ratio=st.floats(0.001, 1.0),
    divisor=st.integers(1, 32),
    min_value=st.none() | st.integers(1, 64),
    min_ratio=st.floats(0, 1),
)
def test_rounding_keeps_its_promises(channels, ratio, divisor, min_value, min_ratio):
    asked = channels * ratio
    width = round_width(asked, channels, divisor, min_value, min_ratio)
    assert 1 <= width <= channels
    assert width % divisor == 0 or width == channels
    assert width >= min(min_ratio * asked, channels)
    assert width >= min(min_value or divisor, channels)


def test_granularity_joins_the_divisor():
    assert round_width(20, 96, 8, granularity=12) == 24


def test_repeats_after_rounding_are_removed():
    unit = OneShotMutableChannelUnit(16, [i / 12 for i in range(2, 13)], "ratio", 8)
    assert unit.candidate_widths == (8, 16) and unit.candidate_choices == [0.5, 1.0]


def test_choices_are_written_as_the_mode_says():
    ratio = OneShotMutableChannelUnit(48, [0.25, 0.5, 1.0])
    number = OneShotMutableChannelUnit(48, [12, 24, 999], candidate_mode="number")
    assert (ratio.max_choice, ratio.min_choice, ratio.current_choice) == (1.0, 0.25, 1.0)
    assert (number.max_choice, number.min_choice, number.current_choice) == (48, 12, 48)
    number.current_choice = 24
    ratio.current_choice = 24
    assert (number.current_choice, ratio.current_choice) == (24, 0.5)
    assert {ratio.sample_choice() for _ in range(100)} == {0.25, 0.5, 1.0}


def test_fixed_units_have_one_choice_and_say_why():
    unit = OneShotMutableChannelUnit(16, [0.5, 1.0], spec=UnitSpec("fc", 16, (), False, "the model's output"))
    assert not unit.is_mutable and unit.candidate_choices == [1.0]
    with pytest.raises(FastslimValueError, match="the model's output"):
        unit.current_choice = 8


def test_default_units_work():
    assert SequentialMutableChannelUnit(4).candidate_choices == [1, 2, 3, 4]
    assert OneShotMutableChannelUnit(8).candidate_choices == [0.5, 1.0]
    assert SlimmableChannelUnit(8).subnet_widths == (8,)
    assert OneShotMutableChannelUnit(8, []).candidate_choices == [1.0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(candidate_choices=0.5), FastslimTypeError, "must be a list of numbers"),
        (dict(candidate_choices=[0.5], choice_mode="number"), FastslimValueError, "use choice_mode='ratio'"),
        (dict(candidate_choices=[0.5, 1.5]), FastslimValueError, "above the full width"),
        (dict(candidate_choices=[0.0]), FastslimValueError, "positive numbers"),
        (dict(candidate_choices=["1"]), FastslimValueError, "positive numbers"),
        (dict(choice_mode="percent"), FastslimValueError, "'number' or 'ratio'"),
        (dict(divisor=0), FastslimValueError, "divisor must be a positive whole number"),
        (dict(divisor=8.0), FastslimValueError, "divisor must be"),
        (dict(min_value=0), FastslimValueError, "min_value must be"),
        (dict(min_ratio=2), FastslimValueError, "min_ratio must lie"),
    ],
)
def test_bad_arguments_name_the_fix(arguments, error, message):
    with pytest.raises(error, match=message):
        OneShotMutableChannelUnit(16, **arguments)


def test_sequential_units_round_what_they_are_given():
    unit = SequentialMutableChannelUnit(48, divisor=8)
    unit.current_choice = 20
    assert unit.current_choice == 24
    unit.current_choice = 0.3
    assert unit.current_choice == 16
    ratio = SequentialMutableChannelUnit(48, "ratio", 8)
    ratio.current_choice = 0.3
    assert ratio.current_choice == 1 / 3
    assert SequentialMutableChannelUnit(624, "number", 48, 528).candidate_widths == (528, 576, 624)
    for choice in (0, 49, 1.5, -0.5):
        with pytest.raises(FastslimValueError, match="is no choice of unit"):
            unit.current_choice = choice
    assert unit.width == 16


@pytest.mark.parametrize("channels", [96, 1280])
def test_ratios_are_rounded_down_but_not_by_floating_point_errors(channels):
    unit = OneShotMutableChannelUnit(channels, [i / 96 for i in range(1, 97)])
    assert unit.candidate_widths == tuple(channels * i // 96 for i in range(1, 97))
    assert OneShotMutableChannelUnit(10, [0.25, 1.0]).candidate_widths == (2, 10)


def test_the_mutable_channel_of_a_unit_is_its_choice():
    unit = OneShotMutableChannelUnit(48, [0.25, 0.5, 1.0])
    unit.current_choice = 0.5
    assert unit.mutable_channel.activated_channels == 24 and unit.mutable_channel.current_choice == 0.5
    unit.mutable_channel.current_choice = 0.25
    assert unit.width == 12
    unit.fix_chosen(1.0)
    assert unit.mutable_channel.is_fixed and unit.candidate_widths == (48,)


def test_choices_that_are_no_numbers_are_refused():
    with pytest.raises(FastslimTypeError, match="must be a number"):
        OneShotMutableChannelUnit(16).current_choice = None


def test_a_ratio_that_is_not_listed_is_refused_though_rounding_would_reach_a_candidate():
    unit = OneShotMutableChannelUnit(48, [i / 12 for i in range(2, 13)], divisor=8)
    unit.current_choice = 5 / 12  # listed; 20 channels are rounded to 24
    assert unit.width == 24
    with pytest.raises(ValueError, match=r"0\.37 is no choice"):
        unit.current_choice = 0.37
    with pytest.raises(AssertionError):  # what MMRazor raises
        unit.current_choice = 0.37
    assert unit.width == 24
