"""Axes: round ticks inside their ends, whatever the values; colours of widths in order."""

from __future__ import annotations

import math

import pytest

from fastslim.engine.report_chart import PALETTE, Axis, Chart, Point, Series, count, count_tick, percent, ramp

SPREADS = [(0.0, 1.0), (0.95, 0.9501), (3.0, 3.0), (1.0, 300.0), (1e3, 3e11), (0.02, 0.5), (97.1, 100.0), (0.0, 0.0)]


@pytest.mark.parametrize(
    ("values", "log"),
    [(values, log) for values in SPREADS for log in (False, True) if values[0] > 0 or not log],
    ids=str,
)
def test_ticks_are_round_few_and_between_the_ends(values: tuple[float, float], log: bool) -> None:
    axis = Axis("x", log=log)
    low, high = axis.spread(values, 0.06)
    assert low < values[0] and high > values[1]
    ticks = axis.ticks(low, high, 6)
    assert 1 <= len(ticks) <= 6
    assert ticks == sorted(set(ticks))
    for tick in ticks:
        assert low <= tick + 1e-9 and tick - 1e-9 <= high
        step = ticks[1] - ticks[0] if len(ticks) > 1 else 0
        assert log or not step or math.isclose(tick / step, round(tick / step), abs_tol=1e-6)


def test_no_tick_is_above_the_limit_and_epochs_are_whole() -> None:
    assert max(Axis("%", limit=100.0).ticks(95.0, 101.0, 6)) == 100
    assert Axis("epoch", whole=True).ticks(0.9, 3.1, 8) == [1, 2, 3]


def test_an_axis_from_zero_begins_there() -> None:
    assert Axis("loss", zero=True).spread([0.5, 2.0], 0.1)[0] == 0


def test_a_logarithmic_axis_has_ticks_of_one_two_and_five() -> None:
    assert Axis("x", log=True).ticks(90.0, 2100.0, 6) == [100, 200, 500, 1000, 2000]
    assert Axis("x", log=True).ticks(1e3, 1e9, 7) == [1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9]


def test_values_without_a_place_do_not_stretch_the_axes() -> None:
    points = (Point(1, 0.5), Point(2, math.nan), Point(math.inf, 0.7), Point(3, 0.9, base=0.1))
    chart = Chart("c", "title", "detail", Axis("x"), Axis("y"), (Series("s", points, "blue"),))
    (left, right), (bottom, top) = chart.ends()
    assert 0.8 < left < 1 < 3 < right < 3.2 and -0.1 < bottom < 0.1 < 0.9 < top < 1.1


@pytest.mark.parametrize(
    ("number", "text", "tick"),
    [
        (0, "0", "0"),
        (999, "999", "999"),
        (1500, "1.50 k", "1.5 k"),
        (2e6, "2.00 M", "2 M"),
        (3.25e12, "3.25 T", "3.25 T"),
    ],
)
def test_counts_have_three_digits_and_a_unit(number: float, text: str, tick: str) -> None:
    assert count(number) == text and count_tick(number) == tick


def test_shares_that_are_no_numbers_are_said_so() -> None:
    assert percent(0.98765, 2) == "98.77 %"
    assert percent(math.nan) == "not a number"


def test_widths_have_colours_in_order_and_the_full_one_the_last() -> None:
    assert [ramp(index, 4) for index in range(4)] == ["ramp0", "ramp2", "ramp3", "ramp5"]
    assert ramp(0, 1) == ramp(11, 12) == "ramp5"
    assert all(ramp(index, 30) in PALETTE for index in range(30))


def luminance(color: str) -> float:
    """Relative luminance of WCAG 2."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", PALETTE)
def test_colours_stand_out_from_the_card_in_light_and_dark(name: str) -> None:
    """A contrast of 3, as WCAG asks for graphics."""
    for color, card in zip(PALETTE[name], ("#ffffff", "#1d2128"), strict=True):
        bright, dark = sorted((luminance(color), luminance(card)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 3, color
