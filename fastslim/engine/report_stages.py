"""What came of the commands after training: a search's held-out results, retrained subnets, exported files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastslim.engine.evaluate import Evaluation, SubnetResult, WidthResult
from fastslim.engine.report_files import Entry, read_json, read_lines

FORMATS = {
    "subnet": "subnet (safetensors and JSON)",
    "pt2": "torch.export program",
    "onnx": "ONNX model",
    "slimmable": "several widths (safetensors)",
}
SUFFIXES = {".pt2": "pt2", ".onnx": "onnx", ".safetensors": "slimmable"}


@dataclass(frozen=True)
class FoundPart:
    """A found subnet on the held-out data.

    Attributes:
        result: its accuracy and cost, under the name that commands take.
        uniform: the uniform width of about the same cost.
    """

    result: SubnetResult
    uniform: SubnetResult | None


@dataclass(frozen=True)
class RetrainedPart:
    """One subnet that was trained on alone.

    Attributes:
        name: of its folder.
        how: what it began with and learned from, in words.
        before: with the supernet's weights; None where it was not evaluated.
        after: with its own.
        accuracies: epochs and accuracies on the way.
    """

    name: str
    how: str
    before: SubnetResult | None
    after: SubnetResult
    accuracies: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class ExportedPart:
    """One exported file, or folder of a subnet.

    Attributes:
        name: its path in the folder of the export.
        format: in words.
        size: bytes, of all files of a folder; None where it is no longer there.
        difference: largest absolute difference to the outputs of the network it was made of; None where unknown.
        scale: largest absolute output that was compared.
    """

    name: str
    format: str
    size: int | None
    difference: float | None = None
    scale: float | None = None


def read_evaluations(rows: Entry) -> tuple[Evaluation, ...]:
    """A table of evaluated subnets, uniform widths or named ones."""
    return tuple(map(read_evaluation, rows.items()))


def read_evaluation(row: Entry) -> Evaluation:
    """One evaluated subnet."""
    if row.maybe("width") is None:
        return named(row)
    return WidthResult(row["width"].number(), *_measures(row))


def named(row: Entry) -> SubnetResult:
    """One evaluated subnet that has a name."""
    return SubnetResult(row["name"].text(), *_measures(row))


def _measures(row: Entry) -> tuple[int, int, float, float]:
    costs = row["multiply_adds"].count(), row["parameters"].count()
    return *costs, row["accuracy"].number(), row["loss"].number()


def read_found(search: Path) -> tuple[tuple[FoundPart, ...], str | None]:
    """What a search's folder says of held-out data, and which images its scores are from."""
    file = search / "results.json"
    if not file.is_file():
        return (), None
    content = read_json(file)
    rows, scored_on = content.maybe("subnets"), content.maybe("scored_on")
    found = []
    for row in rows.items() if rows else []:
        uniform = row.maybe("uniform")
        found.append(FoundPart(named(row), named(uniform) if uniform else None))
    return tuple(found), scored_on.text() if scored_on else None


def read_retrained(run: Path) -> tuple[RetrainedPart, ...]:
    """The subnets in RUN/retrain whose training is finished."""
    found = []
    for file in sorted(run.glob("retrain/*/results.json")):
        content = read_json(file)
        before, after = content.maybe("before"), content.maybe("after")
        if after:
            found.append(
                RetrainedPart(
                    file.parent.name,
                    _how(content),
                    named(before) if before else None,
                    named(after),
                    _accuracies(file.parent / "metrics.jsonl"),
                )
            )
    return tuple(found)


def _how(content: Entry) -> str:
    start, distill = content.maybe("start"), content.maybe("distill")
    words = {None: "", "supernet": "from the supernet's weights", "scratch": "from scratch"}
    text = start.text() if start else None
    teacher = ["learns from the full width"] if distill and distill.value else []
    return ", ".join([word for word in [words.get(text, str(text))] if word] + teacher)


def _accuracies(file: Path) -> tuple[tuple[int, float], ...]:
    records = read_lines(file) if file.is_file() else []
    return tuple(
        (record["epoch"].count(), row["accuracy"].number())
        for record in records
        if record["kind"].text() == "evaluation"
        for row in record["subnets"].items()[:1]
    )


def read_exports(run: Path) -> tuple[ExportedPart, ...]:
    """What lies in RUN/export; what is known of it is in export.json, files beside it were written by hand."""
    folder = run / "export"
    known = _described(folder / "export.json")
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        name = path.relative_to(folder).as_posix()
        if path.name == "subnet.json":
            read_json(path)
            known.setdefault(path.parent.relative_to(folder).as_posix(), _undescribed(path.parent, folder, "subnet"))
        elif path.suffix in SUFFIXES and not (path.parent / "subnet.json").is_file():
            known.setdefault(name, _undescribed(path, folder, SUFFIXES[path.suffix]))
    return tuple(known[name] for name in sorted(known))


def _described(file: Path) -> dict[str, ExportedPart]:
    rows = read_json(file).maybe("files") if file.is_file() else None
    found = {}
    for row in rows.items() if rows else []:
        name, kind = row["path"].text(), row["format"].text()
        size = row["bytes"].count() if (file.parent / name).exists() else None
        found[name] = ExportedPart(
            name, FORMATS.get(kind, kind), size, row["difference"].number(), row["scale"].number()
        )
    return found


def _undescribed(path: Path, folder: Path, kind: str) -> ExportedPart:
    files = path.iterdir() if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files if file.is_file())
    return ExportedPart(path.relative_to(folder).as_posix(), FORMATS[kind], size)
