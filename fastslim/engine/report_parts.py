"""What is known about a run: every file of its folder that a report shows, read and checked."""

from __future__ import annotations

import datetime
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastslim.cost import LatencyReport, LatencyRow
from fastslim.engine.evaluate import Evaluation
from fastslim.engine.options import read_yaml
from fastslim.engine.report_files import Entry, read_json, read_lines
from fastslim.engine.report_stages import (
    ExportedPart,
    FoundPart,
    RetrainedPart,
    read_evaluations,
    read_exports,
    read_found,
    read_retrained,
)
from fastslim.engine.run_folder import RunFolder
from fastslim.errors import FastslimError, FastslimFileError
from fastslim.search.report import EvaluatedSubnet, FoundSubnet, SearchReport


@dataclass(frozen=True)
class EpochPart:
    """One epoch of the training."""

    epoch: int
    lr: float
    images_per_second: float
    losses: dict[str, float]


@dataclass(frozen=True)
class EvaluationPart:
    """The widths after an epoch."""

    epoch: int
    widths: tuple[Evaluation, ...]


@dataclass(frozen=True)
class SearchPart:
    """A search, finished or not.

    Attributes:
        folder: its name in the run's folder.
        report: its result; None until it is finished.
        evaluated: the subnets it has looked at.
        found: what it found, on the held-out data; empty where that was not evaluated.
        scored_on: the images that its scores are from, in words.
    """

    folder: str
    report: SearchReport | None
    evaluated: tuple[EvaluatedSubnet, ...]
    found: tuple[FoundPart, ...] = ()
    scored_on: str | None = None


@dataclass(frozen=True)
class RunParts:
    """All that a folder holds; what it does not hold is empty."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    epochs: tuple[EpochPart, ...] = ()
    evaluations: tuple[EvaluationPart, ...] = ()
    widths: tuple[Evaluation, ...] = ()
    finished: bool = False
    training_seconds: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    machine: str | None = None
    results_time: datetime.datetime | None = None
    searches: tuple[SearchPart, ...] = ()
    retrained: tuple[RetrainedPart, ...] = ()
    exported: tuple[ExportedPart, ...] = ()
    latency: LatencyReport | None = None

    def command(self, verb: str, options: str) -> str:
        """What makes a part that is missing."""
        flag = "--run " if verb == "train" else ""
        return f"fastslim {verb} {flag}{shlex.quote(str(self.path))} {options}"

    @property
    def model(self) -> str:
        """Name of the network."""
        return str(self.config.get("model", "a network"))

    @property
    def found(self) -> tuple[FoundPart, ...]:
        """What the searches found, on the held-out data."""
        return tuple(found for search in self.searches for found in search.found)

    @property
    def data(self) -> str:
        """Name of the data."""
        return str(self.config.get("data", "unknown data"))


def read_parts(run: Path | str) -> RunParts:
    """Reads a run's folder.

    Raises:
        FastslimFileError: there is no such folder, it holds nothing of a run, or a file in it is damaged.
    """
    folder = RunFolder(run)
    if not folder.path.is_dir():
        raise FastslimFileError(f"there is no run folder {folder.path}")
    results = read_json(folder.results) if folder.results.is_file() else None
    if results and results.maybe("after"):
        raise FastslimFileError(
            f"{folder.path} is the folder of a retrained subnet: give its run's, {folder.path.resolve().parents[1]}"
        )
    config = _config(folder, results)
    epochs, evaluations = _metrics(folder.metrics)
    searches = _searches(folder.path)
    retrained = read_retrained(folder.path)
    exported = read_exports(folder.path)
    latency = _latency(folder.path)
    if not (epochs or evaluations or results or config or searches or retrained or exported or latency):
        raise FastslimFileError(
            f"{folder.path} holds nothing of a run: neither metrics.jsonl nor results.json nor a search; give the "
            "folder that `fastslim train --run` wrote"
        )
    measured = results.maybe("widths") if results else None
    versions = results.maybe("versions") if results else None
    seconds = results.maybe("training_seconds") if results else None
    machine = results.maybe("machine") if results else None
    latest = evaluations[-1].widths if evaluations else ()
    return RunParts(
        folder.path,
        config=config,
        epochs=epochs,
        evaluations=evaluations,
        widths=read_evaluations(measured) if measured else latest,
        finished=results is not None and bool(results.value.get("finished")),
        training_seconds=seconds.number() if seconds else None,
        versions={name: entry.text() for name, entry in versions.pairs().items()} if versions else {},
        machine=machine.text() if machine else None,
        results_time=_written(folder.results) or _written(folder.metrics),
        searches=searches,
        retrained=retrained,
        exported=exported,
        latency=latency,
    )


def _written(file: Path) -> datetime.datetime | None:
    return datetime.datetime.fromtimestamp(file.stat().st_mtime).astimezone() if file.is_file() else None


def _config(folder: RunFolder, results: Entry | None) -> dict[str, Any]:
    if folder.config.is_file():
        try:
            return read_yaml(folder.config)
        except FastslimError as error:
            raise FastslimFileError(f"{folder.config} is damaged: {error}") from error
    saved = results.maybe("config") if results else None
    return {name: entry.value for name, entry in saved.pairs().items()} if saved else {}


def _metrics(file: Path) -> tuple[tuple[EpochPart, ...], tuple[EvaluationPart, ...]]:
    epochs, evaluations = [], []
    for record in read_lines(file) if file.is_file() else []:
        kind = record["kind"].text()
        if kind == "epoch":
            losses = {name: entry.number() for name, entry in record["losses"].pairs().items()}
            rate = record["images_per_second"].number()
            epochs.append(EpochPart(record["epoch"].count(), record["lr"].number(), rate, losses))
        elif kind == "evaluation":
            evaluations.append(EvaluationPart(record["epoch"].count(), read_evaluations(record["widths"])))
    return tuple(epochs), tuple(evaluations)


def _searches(run: Path) -> tuple[SearchPart, ...]:
    """The search in the folder ``search``, and others beside it (``search-evolution``) or in it."""
    folders = [*sorted(run.glob("search*")), *sorted(run.glob("search*/*"))]
    found = []
    for folder in folders:
        report, lines = folder / "report.json", folder / "evaluated.jsonl"
        name = folder.relative_to(run).as_posix()
        if report.is_file():
            read = read_search(report)
            found.append(SearchPart(name, read, read.evaluated, *read_found(folder)))
        elif lines.is_file():
            found.append(SearchPart(name, None, tuple(_subnet(line) for line in read_lines(lines))))
    return tuple(found)


def read_search(file: Path) -> SearchReport:
    """A report of a search, with every value checked."""
    SearchReport.load(file)  # says best what is no report at all
    entry = read_json(file)
    return SearchReport(
        entry["method"].text(),
        entry["metric"].text(),
        _subnet(entry["full"]),
        tuple(
            FoundSubnet(row["cost"].text(), row["budget"].number(), row["limit"].number(), *_subnet_values(row))
            for row in entry["found"].items()
        ),
        tuple(_subnet(row) for row in entry["evaluated"].items()),
    )


def _subnet(row: Entry) -> EvaluatedSubnet:
    return EvaluatedSubnet(*_subnet_values(row))


def _subnet_values(row: Entry) -> tuple[dict[str, int], dict[str, float], float]:
    row["costs"]["flops"], row["costs"]["parameters"]  # which all have; "memory" and "latency" some
    return (
        {name: width.count() for name, width in row["subnet"].pairs().items()},
        {name: cost.number() for name, cost in row["costs"].pairs().items()},
        row["score"].number(),
    )


def _latency(run: Path) -> LatencyReport | None:
    """What `LatencyTable.check` found, if it was kept as latency.json."""
    file = run / "latency.json"
    if not file.is_file():
        return None
    entry = read_json(file)
    rows = [
        LatencyRow(
            {name: width.count() for name, width in row["subnet"].pairs().items()},
            row["multiply_adds"].count(),
            _time(row["predicted"]),
            _time(row["measured"]),
        )
        for row in entry["rows"].items()
    ]
    if not rows:
        raise entry["rows"].wrong("a list of subnets")
    drift = entry.maybe("drift")
    return LatencyReport(tuple(rows), entry["where"].text(), _time(drift) if drift else 1.0)


def _time(entry: Entry) -> float:
    if not 0 < entry.number() < float("inf"):
        raise entry.wrong("a time above 0")
    return entry.number()


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The pairs of cost and score that no other one beats in both, from cheap to good."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(
        (pair for pair in points if math.isfinite(pair[1])), key=lambda pair: (pair[0], -pair[1])
    ):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front
