"""The report's numbers, on times written down by hand."""

from __future__ import annotations

import pytest

from fastslim.cost import LatencyReport, LatencyRow
from fastslim.cost.latency_report import rank_correlation


def report(*times: tuple[float, float]) -> LatencyReport:
    rows = (LatencyRow({}, 10**6 * i, predicted, measured) for i, (predicted, measured) in enumerate(times))
    return LatencyReport(tuple(rows), "a machine")


def test_errors_are_relative_to_what_was_measured() -> None:
    found = report((1.1, 1.0), (1.8, 2.0), (3.0, 4.0))
    assert [row.error for row in found.rows] == pytest.approx([0.1, -0.1, -0.25])
    assert (found.median_error, found.largest_error) == pytest.approx((0.1, 0.25))


def test_a_machine_that_became_slower_is_told_apart() -> None:
    rows = report((1.0, 1.5), (2.0, 3.3)).rows
    found = LatencyReport(rows, "a machine", drift=1.5)
    assert found.median_error == pytest.approx((1 / 3 + 13 / 33) / 2)
    assert (found.steady_median_error, found.steady_largest_error) == pytest.approx((1 / 22, 1 / 11))


def test_ranks_compare_orders_only() -> None:
    assert report((1, 10), (2, 20), (9, 30)).rank_correlation == pytest.approx(1)
    assert report((9, 10), (2, 20), (1, 30)).rank_correlation == pytest.approx(-1)
    assert report((1, 30), (2, 20), (3, 10)).rank_correlation_of_multiply_adds == pytest.approx(-1)


def test_equal_times_share_a_rank() -> None:
    # Ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3.
    assert rank_correlation([1, 5, 5, 7], [1, 2, 3, 4]) == pytest.approx(0.9486833)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0


def test_it_prints_a_line_a_subnet() -> None:
    lines = str(report((1.1, 1.0), (1.8, 2.0))).splitlines()
    assert lines[0] == "2 subnets on a machine"
    assert lines[1] == "relative error: median 10.0 %, largest 10.0 %"
    assert lines[2].startswith(
        "the fitted networks took 1.00 times as long as in the table; without that: median 10.0 %"
    )
    assert lines[3] == "rank correlation with measured times: 1.000 (multiply-adds: 1.000)"
    assert lines[-1].split() == ["1.0", "M", "1.800", "2.000", "-10.0", "%"]
