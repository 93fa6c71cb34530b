"""Choices that are computed from other choices."""

import pytest
import torch

from fastslim.errors import FastslimRuntimeError, FastslimTypeError, FastslimValueError
from fastslim.mutators import (
    BaseMutable,
    DerivedMutable,
    MutableValue,
    OneShotMutableChannel,
    OneShotMutableValue,
    SequentialMutableChannel,
    SimpleMutableChannel,
)
from fastslim.nn import active_segments


def prefix(active, size):
    return torch.arange(size) < active


def test_the_same_follows_its_source():
    channel = SequentialMutableChannel(3)
    same = channel.derive_same_mutable()
    channel.current_choice = 2
    assert same.source_mutables == {channel} and same.current_choice == 2
    assert torch.equal(same.current_mask, prefix(2, 3)) and not same.is_fixed and same.num_choices == 1


@pytest.mark.parametrize(("ratio", "active", "size"), [(3, 6, 9), (1, 2, 3), (1.5, 3, 4), (2.5, 5, 7), (0.5, 1, 1)])
@pytest.mark.parametrize("mode", ["number", "ratio"])
def test_expanded_channels(mode, ratio, active, size):
    channel = SequentialMutableChannel(3, mode)
    for derived in (channel * ratio, ratio * channel, channel.expand_mutable_channel(ratio)):
        channel.current_choice = 2
        assert derived.current_choice == active and torch.equal(derived.current_mask, prefix(active, size))


def test_channels_times_a_value_that_changes():
    channel, value = SequentialMutableChannel(10), OneShotMutableValue([2.0, 2.5, 3.0, 3.5])
    products = (channel * value, value * channel)
    for width, ratio, expected in ((6, 3.5, 21), (9, 3.5, 31), (7, 2.5, 17), (10, 2.0, 20)):
        channel.current_choice, value.current_choice = width, ratio
        for product in products:
            assert product.source_mutables == {channel, value} and product.current_choice == expected
            assert torch.equal(product.current_mask, prefix(expected, 35))
    channel.fix_chosen()
    assert not products[0].is_fixed
    value.fix_chosen(2.5)
    assert products[0].is_fixed


def test_channels_times_a_value_without_a_largest_choice_are_refused():
    channel = SequentialMutableChannel(4)
    value = MutableValue([1, 2, 3])
    for product in (lambda: channel * value, lambda: value * channel):
        with pytest.raises(TypeError, match="use a number, or a OneShotMutableValue"):
            product()


@pytest.mark.parametrize("divisor", [8, 8.0, (8, 8)])
def test_divided_channels_are_rounded_to_eight(divisor):
    channel = SequentialMutableChannel(128)
    derived = channel // divisor
    for width, expected in ((128, 16), (120, 16), (64, 8), (1, 8)):
        channel.current_choice = width
        assert derived.current_choice == expected and torch.equal(derived.current_mask, prefix(expected, 16))
    assert (OneShotMutableValue([112, 120]) // 8).current_choice == 16
    channel.current_choice = 120
    assert (channel // (8, 1)).current_choice == 15
    assert (channel // OneShotMutableValue([4, 10])).current_choice == 12


def test_concatenated_channels_are_segments():
    one, two = SequentialMutableChannel(3), SequentialMutableChannel(4)
    joined = DerivedMutable.derive_concat_mutable(iter([one, two]))
    one.current_choice, two.current_choice = 1, 3
    assert joined.source_mutables == {one, two} and joined.current_choice == 4
    assert active_segments(joined) == ((0, 1), (3, 3))
    # A flatten repeats each channel; the channels stay where they are.
    assert active_segments(joined * 2) == ((0, 2), (6, 6))
    assert torch.equal(joined.derive_same_mutable().current_mask, joined.current_mask)
    with pytest.raises(FastslimRuntimeError, match="has no channels"):
        DerivedMutable.derive_concat_mutable([one, OneShotMutableValue([1, 2])])


def test_derived_mutables_nest():
    a, b = SequentialMutableChannel(2), SequentialMutableChannel(3)
    c = a * 1
    d = DerivedMutable.derive_concat_mutable([b, c])
    e = DerivedMutable.derive_concat_mutable([c, d])
    a.current_choice, b.current_choice = 1, 3
    assert (c.source_mutables, d.source_mutables, e.source_mutables) == ({a}, {a, b}, {a, b})
    assert e.current_choice == 5
    assert torch.equal(e.current_mask, torch.tensor([1, 0, 1, 1, 1, 1, 0], dtype=torch.bool))


def test_sources_are_found_in_closures():
    one, two, three = (SequentialMutableChannel(4) for _ in range(3))
    derived = one * 2

    def closing_over(first, second):
        return lambda: (first, second)

    found = DerivedMutable(closing_over({one: [2, 3], two: 2}, None), closing_over({2: [one]}, {3: derived}))
    assert found.source_mutables == {one, two}
    more = DerivedMutable(closing_over([], "text"), closing_over({2: [one, three]}, {3: derived}))
    assert more.source_mutables == {one, three}
    with pytest.raises(FastslimRuntimeError, match="list them as source_mutables"):
        DerivedMutable(lambda: 1)
    with pytest.raises(FastslimValueError, match="that are not derived"):
        DerivedMutable(lambda: 1, source_mutables=[derived])


def test_nothing_of_a_derived_mutable_can_be_set():
    derived = SequentialMutableChannel(3) * 2
    for name, value in (("current_choice", 2), ("current_mask", torch.ones(6)), ("is_fixed", True)):
        with pytest.raises(FastslimRuntimeError, match="source_mutables"):
            setattr(derived, name, value)
    derived.fix_chosen(derived.dump_chosen().chosen)
    assert derived.dump_chosen().chosen == 6 and not derived.is_fixed
    with pytest.raises(FastslimRuntimeError, match="has no channels"):
        _ = (OneShotMutableValue([1, 2]) * 2).current_mask
    for other in ("2", True, None):
        with pytest.raises(FastslimTypeError, match="a number or a mutable"):
            derived * other


def test_all_that_a_derived_mutable_can_be():
    channel = OneShotMutableChannel(6, [2, 6])
    derived = channel * 2
    assert derived.choices == [4, 12] and channel.current_choice == 6


def test_masks_of_any_form_are_expanded():
    channel = SimpleMutableChannel(3)
    channel.current_choice = torch.tensor([1, 0, 1])
    assert active_segments(channel * 2) == ((0, 2), (4, 2)) and (channel * 2).current_choice == 4


@pytest.mark.parametrize("ratio", [1, 2, 3, 1.5, 2.0])
def test_values(ratio):
    value = OneShotMutableValue(value_list=[7, 3, 5])
    product = value * ratio
    assert isinstance(product, (BaseMutable, DerivedMutable)) and product.source_mutables == {value}
    assert (value.current_choice, value.min_choice, value.max_choice, value.choices) == (7, 3, 7, [3, 5, 7])
    for choice in value.choices:
        value.current_choice = choice
        assert product.current_choice == int(choice * ratio)
    assert {value.sample_choice() for _ in range(60)} == {3, 5, 7}
    with pytest.raises(FastslimValueError, match=r"4 is no choice .* \[3, 5, 7\]"):
        value.current_choice = 4
    value.fix_chosen(5)
    with pytest.raises(FastslimRuntimeError, match="fixed already"):
        value.fix_chosen(5)
    assert value.dump_chosen().meta == {"all_choices": [3, 5, 7]}
    with pytest.raises(FastslimTypeError, match="of one type"):
        OneShotMutableValue([1, 2.0])
    with pytest.raises(FastslimValueError, match="is empty"):
        OneShotMutableValue([])
    assert OneShotMutableValue([1, 2], default_value=1).current_choice == 1
