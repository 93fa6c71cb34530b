"""Which backend was fastest, as a benchmark recorded it: one table per GPU architecture in `measured/`."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).with_name("measured")


class Best(NamedTuple):
    """A recorded choice.

    Attributes:
        backend: the fastest one.
        where: device and commit of the measurement.
    """

    backend: str
    where: str


@functools.cache
def _table(target: str) -> dict[str, list[tuple[tuple[float, ...], Best]]]:
    path = FOLDER / f"{target}.json"
    if not path.exists():
        return {}
    recorded = json.loads(path.read_text())
    where = f"{recorded['device']} at {recorded['commit']}"
    table: dict[str, list[tuple[tuple[float, ...], Best]]] = {}
    for row in recorded["rows"]:
        table.setdefault(row["key"], []).append((tuple(row["sizes"]), Best(row["best"], where)))
    return table


def key(op: str, dtype: object, *exact: object) -> str:
    """How a kind of call is named in the table: op, data type, and all that must be equal."""
    return " ".join([op, str(dtype).removeprefix("torch."), *map(str, exact)])


@functools.lru_cache(maxsize=65536)
def best(target: str, kind: str, sizes: tuple[int, ...]) -> Best | None:
    """The fastest backend at the recorded sizes that are nearest to these (in ratios), or None.

    Args:
        target: architecture, such as ``"sm_90"``.
        kind: see :func:`key`.
        sizes: of the call, such as rows and channels.
    """
    rows = _table(target).get(kind)
    if not rows:
        return None
    return min(rows, key=lambda row: sum(math.log((a + 1) / (b + 1)) ** 2 for a, b in zip(row[0], sizes, strict=True)))[
        1
    ]
