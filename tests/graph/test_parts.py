"""The table of units: which entries of dimensions change together, when they are joined, cut and divided."""

import pytest

from fastslim.graph.parts import NotUnderstoodError, Part, UnitTable, scaled, total
from fastslim.graph.report import Finding

REASON = Finding("here", "file.py:1", "a reason")


def table(*channels):
    units = UnitTable()
    return units, [(units.new(n, f"layer{i}"),) for i, n in enumerate(channels)]


def names(units):
    return [units[root].producer for root in units.roots()]


def widths(units, parts):
    """(unit, entries) of the parts as they are now."""
    return [(part.unit, part.channels) for part in units.resolve(parts)]


def test_tied_units_become_one_that_the_first_layer_names():
    units, (one, other) = table(8, 8)
    tied = units.tie(other, one, REASON)
    assert widths(units, one) == widths(units, other) == widths(units, tied)
    assert names(units) == [("layer0", 0, 8, 8)]
    units.tie(one, other, REASON)
    assert len(units.roots()) == 1


def test_entries_several_to_a_channel_go_with_the_channel():
    """Flattened pixels (8 x 9) that meet a linear layer of 72 inputs: the unit is counted in 72 steps, 9 at a time."""
    units, (conv, linear) = table(8, 72)
    tied = units.tie(scaled(conv, 9), linear, REASON)
    assert total(tied) == 72 and len(tied) == 1
    unit = units[tied[0].unit]
    assert (unit.channels, unit.granularity, unit.producer) == (72, 9, ("layer0", 0, 8, 8))
    assert widths(units, conv) == [(tied[0].unit, 8)]


def test_units_of_different_sizes_are_counted_in_their_common_multiple():
    units, (one, other) = table(4, 6)
    units.tie(scaled(one, 3), scaled(other, 2), REASON)
    (root,) = units.roots()
    assert (units[root].channels, units[root].granularity) == (12, 6)


def test_borders_split_both_sides():
    """Concatenated 4 + 8 channels are added to concatenated 6 + 6."""
    units, (a, b, c, d) = table(4, 8, 6, 6)
    tied = units.tie((*a, *b), (*c, *d), REASON)
    assert [part.channels for part in tied] == [4, 2, 6]
    assert len(units.roots()) == 3
    assert names(units) == [("layer0", 0, 4, 4), ("layer1", 0, 2, 8), ("layer1", 2, 8, 8)]
    assert widths(units, b) == [(part.unit, part.channels) for part in tied[1:]]
    assert widths(units, c) == [(part.unit, part.channels) for part in tied[:2]]


def test_a_part_of_a_split_unit_is_split_wherever_it_is():
    units, (x,) = table(12)
    pixels = scaled(x, 4)
    head, tail = units.cut(x, [4])
    assert [part.channels for part in units.resolve(pixels)] == [16, 32]
    assert total(head) == 4 and total(tail) == 8
    assert names(units) == [("layer0", 0, 4, 12), ("layer0", 4, 12, 12)]


def test_blocks_are_cut_and_tied():
    """q, k and v of one projection: three blocks that change together."""
    units, (qkv,) = table(24)
    q, k, v = units.cut(qkv, [8, 16])
    units.tie(units.tie(q, k, REASON), v, REASON)
    assert len(units.roots()) == 1
    assert names(units) == [("layer0", 0, 8, 24)]
    (unit,) = {part.unit for part in units.resolve(qkv)}
    assert widths(units, qkv) == [(unit, 8)] * 3


def test_cutting_where_blocks_end_already_splits_nothing():
    units, (a, b) = table(4, 4)
    assert [total(piece) for piece in units.cut((*a, *b), [4])] == [4, 4]
    assert len(units.roots()) == 2


def test_pieces_of_channels_that_are_always_there():
    units = UnitTable()
    assert [total(piece) for piece in units.cut((Part(None, 10),), [3, 7])] == [3, 4, 3]
    assert units.roots() == []


def test_counted_channels_are_cut_by_their_count():
    """Behind a shuffle, half of the channels is half of the unit, whatever its width."""
    units, (x,) = table(8)
    half, other = units.cut((Part(x[0].unit, 8, counted=True),), [4])
    assert widths(units, half) == widths(units, other) == [(x[0].unit, 4)]
    assert units[x[0].unit].granularity == 2


def test_full_width_on_one_side_keeps_the_other_full():
    units, (x,) = table(8)
    units.tie(x, (Part(None, 8),), REASON)
    assert not units.is_free(x[0]) and units[x[0].unit].finding is REASON


def test_the_first_reason_stays():
    units, (one, other) = table(4, 4)
    assert units.fix(one, REASON)
    assert not units.fix(one, Finding("later", "", "another"))
    units.tie(other, one, REASON)
    assert units[other[0].unit].finding is REASON
    assert not units.is_free(other[0])


def test_blocks_of_a_unit_that_stays_full_stay_full():
    units, (x,) = table(8)
    units.fix(x, REASON)
    head, tail = units.cut(x, [4])
    assert not any(units.is_free(part) for part in (*head, *tail))


def test_division_asks_for_whole_numbers():
    units, (x,) = table(12)
    (part,) = units.divided(x, 4)
    assert (part.channels, units[part.unit].granularity) == (3, 4)
    (part,) = units.divided(scaled(x, 4), 4)
    assert (part.channels, units[part.unit].granularity) == (12, 4)
    units.need_multiple(x[0].unit, 6)
    assert units[x[0].unit].granularity == 12


def test_division_of_entries_several_to_a_channel():
    """Six entries to a channel, four taken together: two channels make three."""
    units, (x,) = table(8)
    (part,) = units.divided(scaled(x, 6), 4)
    assert (part.channels, units[part.unit].granularity) == (12, 2)


@pytest.mark.parametrize(
    ("channels", "divisor", "words"), [((12,), 5, "across the border"), ((6, 10), 4, "across the border")]
)
def test_division_across_a_border_is_refused(channels, divisor, words):
    units, parts = table(*channels)
    with pytest.raises(NotUnderstoodError, match=words):
        units.divided(tuple(part for dim in parts for part in dim), divisor)


def test_multiples_that_do_not_fit_are_refused():
    units, (x,) = table(12)
    with pytest.raises(NotUnderstoodError, match="multiples of 5, which 12 is not"):
        units.need_multiple(x[0].unit, 5)
    assert units[x[0].unit].granularity == 1


def state(units):
    return [
        (units[root].channels, units[root].granularity, units[root].producer, units[root].finding)
        for root in units.roots()
    ]


@pytest.mark.parametrize("sizes", [((8,), (6,)), ((4, 4), (4, 6)), ((4,), (4, 4))])
def test_different_totals_are_refused_and_leave_the_table_usable(sizes):
    units, parts = table(*sizes[0], *sizes[1])
    one, other = parts[: len(sizes[0])], parts[len(sizes[0]) :]
    one, other = (tuple(part for dim in side for part in dim) for side in (one, other))
    with pytest.raises(NotUnderstoodError, match="different channel counts"):
        units.tie(one, other, REASON)
    assert_consistent(units, one, other)


def test_a_border_inside_a_group_is_refused():
    units, (grouped, a, b) = table(8, 3, 5)
    units.need_multiple(grouped[0].unit, 4)
    before = state(units)
    with pytest.raises(NotUnderstoodError, match="groups of 4"):
        units.tie(grouped, (*a, *b), REASON)
    assert state(units) == before


def test_a_border_inside_a_channel_is_refused():
    units, (x, a, b) = table(4, 5, 7)
    before = state(units)
    with pytest.raises(NotUnderstoodError, match="middle of a channel"):
        units.tie(scaled(x, 3), (*a, *b), REASON)
    assert state(units) == before
    assert_consistent(units, x, a, b)


def test_channels_beside_themselves_at_another_place_are_refused_or_all_one():
    """``cat([a, b]) + cat([b, a])``, with a and b of different size: every border makes new ones."""
    units, (a, b) = table(3, 5)
    tied = units.tie((*a, *b), (*b, *a), REASON)
    assert {part.unit for part in tied} == {units.resolve(a)[0].unit}
    assert [part.channels for part in tied] == [1] * 8


def test_channels_added_to_their_mirror_image_are_halves():
    units, (a,) = table(8)
    head, tail = units.cut(a, [4])
    tied = units.tie((*head, *tail), (*tail, *head), REASON)
    assert len({part.unit for part in tied}) == 1
    assert names(units) == [("layer0", 0, 4, 8)]


def test_units_without_a_layer_take_the_name_of_the_one_they_meet():
    units = UnitTable()
    free = (units.new(8),)
    layer = (units.new(8, "layer"),)
    units.tie(free, layer, REASON)
    assert names(units) == [("layer", 0, 8, 8)]


def test_roots_are_in_the_order_of_their_layers():
    units = UnitTable()
    unnamed, late, early = units.new(2), units.new(4), units.new(6)
    units.set_producer((early,), "early")
    units.set_producer((late,), "late")
    assert units.roots() == [early.unit, late.unit, unnamed.unit]


def test_a_layer_with_several_parts_names_each_by_its_range():
    units = UnitTable()
    parts = (units.new(4), Part(None, 2), units.new(6))
    units.set_producer(parts, "layer")
    assert names(units) == [("layer", 0, 4, 12), ("layer", 6, 12, 12)]


def assert_consistent(units, *dims):
    """Every entry belongs to exactly one unit, and widths divide it evenly."""
    for parts in dims:
        resolved = units.resolve(parts)
        assert total(resolved) == total(parts)
        for part in resolved:
            unit = units[part.unit]
            assert unit.channels % unit.granularity == 0
            assert part.channels * unit.granularity % unit.channels == 0
