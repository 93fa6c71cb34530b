"""How far estimated times are from whole networks that ran."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LatencyRow:
    """One subnet.

    Attributes:
        subnet: width by unit name.
        multiply_adds: of one sample.
        predicted: ms, from the table.
        measured: ms, of the exported network.
    """

    subnet: dict[str, int]
    multiply_adds: int
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative error of the prediction; negative where the network is slower than predicted."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class LatencyReport:
    """What `LatencyTable.check` found.

    Attributes:
        rows: the subnets, from the fastest to the slowest.
        where: machine and way to run.
        drift: time of the networks the table is fitted to during the check, relative to what it was in the table.
    """

    rows: tuple[LatencyRow, ...]
    where: str
    drift: float = 1.0

    @property
    def median_error(self) -> float:
        """Median of the absolute relative errors."""
        return statistics.median(abs(row.error) for row in self.rows)

    @property
    def largest_error(self) -> float:
        """Largest absolute relative error."""
        return max(abs(row.error) for row in self.rows)

    @property
    def steady_median_error(self) -> float:
        """As `median_error`, had the machine been as fast as when the table was measured."""
        return statistics.median(self._steady_errors())

    @property
    def steady_largest_error(self) -> float:
        """As `largest_error`, had the machine been as fast as when the table was measured."""
        return max(self._steady_errors())

    def _steady_errors(self) -> list[float]:
        return [abs(row.predicted * self.drift / row.measured - 1) for row in self.rows]

    @property
    def rank_correlation(self) -> float:
        """Spearman's rank correlation of predicted and measured times; 1: the same order."""
        return rank_correlation([row.predicted for row in self.rows], [row.measured for row in self.rows])

    @property
    def rank_correlation_of_multiply_adds(self) -> float:
        """Spearman's rank correlation of multiply-adds and measured times: what one has without a table."""
        return rank_correlation([row.multiply_adds for row in self.rows], [row.measured for row in self.rows])

    def __str__(self) -> str:
        lines = [
            f"{len(self.rows)} subnets on {self.where}",
            f"relative error: median {100 * self.median_error:.1f} %, largest {100 * self.largest_error:.1f} %",
            f"the fitted networks took {self.drift:.2f} times as long as in the table; without that: median "
            f"{100 * self.steady_median_error:.1f} %, largest {100 * self.steady_largest_error:.1f} %",
            f"rank correlation with measured times: {self.rank_correlation:.3f} "
            f"(multiply-adds: {self.rank_correlation_of_multiply_adds:.3f})",
            "multiply-adds  predicted ms  measured ms   error",
        ]
        lines += [
            f"{row.multiply_adds / 1e6:>11.1f} M  {row.predicted:>12.3f}  {row.measured:>11.3f}  "
            f"{100 * row.error:>+5.1f} %"
            for row in self.rows
        ]
        return "\n".join(lines)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rho; equal values share the mean of their ranks. 0 where one side is all equal."""
    first, second = _ranks(one), _ranks(other)
    if len(set(first)) < 2 or len(set(second)) < 2:
        return 0.0
    return statistics.correlation(first, second)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first = {value: place for place, value in reversed(list(enumerate(ordered)))}
    return [first[value] + (ordered.count(value) - 1) / 2 for value in values]
