"""The dispatch table: which backend a benchmark found fastest, under the keys that the ops' own rules ask for.

python benchmarks/gpu/record.py RESULT.json      writes fastslim/ops/measured/<sm_XX>.json from a result file
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import results

from fastslim.ops import backend, measured


class Question(NamedTuple):
    """What a rule asks the table."""

    key: str
    sizes: tuple[int, ...]


@contextlib.contextmanager
def questions() -> Iterator[list[Question]]:
    """Collects what the rules ask the table while the block runs; every call decides anew."""
    asked: list[Question] = []
    answer = measured.best

    def listen(target: str, kind: str, sizes: tuple[int, ...]) -> None:
        asked.append(Question(kind, tuple(sizes)))

    backend.forget()
    measured.best = listen
    try:
        yield asked
    finally:
        measured.best = answer
        backend.forget()


def rows(timed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table's rows.

    Args:
        timed: one entry per case: "op", "shape", "direction", "times" (microseconds by backend) and "asked", the
            (key, sizes) that its call asked for. A direction that asks nothing is computed by the backend of the
            forward, so its time counts there.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in timed:
        groups.setdefault((entry["op"], entry["shape"]), []).append(entry)
    answers: dict[tuple[str, tuple[int, ...]], list[dict[str, float]]] = {}
    for group in groups.values():
        silent = [entry for entry in group if not entry["asked"]]
        for entry in group:
            together = [entry, *silent] if entry["direction"].startswith("forward") else [entry]
            for key, sizes in entry["asked"]:
                answers.setdefault((key, tuple(sizes)), []).append(_summed([part["times"] for part in together]))
    made = []
    for (key, sizes), measurements in sorted(answers.items()):
        times = _summed(measurements)  # of all cases that ask the same
        if times:
            best = min(times, key=times.__getitem__)
            made.append({"key": key, "sizes": list(sizes), "best": best, "times": times})
    return made


def _summed(measurements: list[dict[str, float]]) -> dict[str, float]:
    """Total time of every backend that could compute them all."""
    backends = set.intersection(*map(set, measurements))
    return {name: round(sum(times[name] for times in measurements), 2) for name in sorted(backends)}


def table(result: dict[str, Any]) -> dict[str, Any]:
    """The dispatch table of a result file.

    Raises:
        SystemExit: the file has no timings.
    """
    data = result["stages"].get("kernels", {}).get("data", {})
    if not data.get("timed"):
        raise SystemExit("the file has no timings of kernels: run benchmarks/gpu/run.sh kernels first")
    about = result["machine"]
    return {
        "device": about["device"],
        "commit": about["commit"],
        "torch": about["torch"],
        "rows": rows(data["timed"]),
    }


def record(result: dict[str, Any], folder: Path = measured.FOLDER) -> Path:
    """Writes the dispatch table."""
    made = table(result)
    lines = ",\n  ".join(json.dumps(row) for row in made.pop("rows"))
    head = json.dumps(made, indent=1)[:-2]
    path = folder / f"{result['stages']['kernels']['data']['target']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results.write(path, f'{head},\n "rows": [\n  {lines}\n ]\n}}\n')
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(record(json.loads(Path(sys.argv[1]).read_text())))
