"""The sections of a report, each from what is known about its part of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastslim.engine.evaluate import Evaluation
from fastslim.engine.export_run import format_bytes
from fastslim.engine.report_chart import count, percent
from fastslim.engine.report_costs import accuracy_chart, best_row
from fastslim.engine.report_curves import latency_chart, loss_chart, pace_charts, progress_chart, retraining_chart
from fastslim.engine.report_markup import Markup
from fastslim.engine.report_page import Cell, Section, card, figure, missing, pair, table
from fastslim.engine.report_parts import RunParts
from fastslim.engine.report_words import COUNTED, counted, duration, title_of
from fastslim.engine.subnets import found_name


def headline(parts: RunParts) -> list[Markup]:
    """The few numbers one wants to know first."""
    cards = []
    rows = sorted(parts.widths, key=lambda row: row.multiply_adds)
    if rows:
        full = rows[-1]
        cards.append(card("Full network", percent(full.accuracy), counted(full)))
        if len(rows) > 1:
            narrow, share = rows[0], rows[0].multiply_adds / max(full.multiply_adds, 1)
            small = f"with {percent(share)} of the multiply-adds"
            cards.append(card(f"Narrowest, {title_of(narrow)}", percent(narrow.accuracy), small))
    retrained = best_row([part.after for part in parts.retrained])
    found = best_row([found.result for found in parts.found])
    if retrained:
        cards.append(
            card("Best retrained", percent(retrained.accuracy), f"{title_of(retrained)}: {counted(retrained)}")
        )
    elif found:
        cards.append(card("Best found", percent(found.accuracy), f"{title_of(found)}: {counted(found)}"))
    evaluated = sum(len(search.evaluated) for search in parts.searches)
    if evaluated:
        chosen = sum(len(search.report.found) for search in parts.searches if search.report)
        cards.append(card("Search", f"{evaluated}", f"subnets evaluated, {chosen} chosen"))
    if parts.exported:
        sizes = [file.size for file in parts.exported if file.size is not None]
        small = f"files, the smallest {format_bytes(min(sizes))}" if sizes else "files, none there any more"
        cards.append(card("Exported", f"{len(parts.exported)}", small))
    if parts.training_seconds is not None:
        cards.append(card("Training", duration(parts.training_seconds), f"{len(parts.epochs)} epochs"))
    return cards


def accuracy_section(parts: RunParts) -> Section:
    """Accuracy against cost, of uniform widths, found subnets and retrained ones."""
    charts = [chart for cost in COUNTED if (chart := accuracy_chart(parts, cost))]
    body = [pair(*map(figure, charts))] if charts else []
    if parts.widths:
        body.append(_evaluations("Uniform widths", "Every unit keeps the same part of its channels", parts.widths))
    else:
        body.append(missing("No width was evaluated yet: finish the training with", parts.command("train", "--resume")))
    if parts.retrained:
        body.append(_retrained(parts))
    elif parts.searches:
        body.append(
            missing("No subnet was trained alone yet:", parts.command("retrain", f"--subnet {_first_found(parts)}"))
        )
    return Section("accuracy", "Accuracy against cost", tuple(body))


def _first_found(parts: RunParts) -> str:
    found = [found_name(found) for search in parts.searches if search.report for found in search.report.found]
    return found[0] if found else "width-0.5"


def _evaluations(title: str, detail: str, given: Sequence[Evaluation]) -> Markup:
    rows = sorted(given, key=lambda row: -row.multiply_adds)
    full = max(rows[0].multiply_adds, 1)
    head = [
        Cell("width"),
        Cell("multiply-adds"),
        Cell("of full"),
        Cell("parameters"),
        Cell("accuracy"),
        Cell("loss, nats"),
    ]
    cells = [
        [
            Cell(title_of(row)),
            Cell(count(row.multiply_adds), row.multiply_adds),
            Cell(percent(row.multiply_adds / full), row.multiply_adds),
            Cell(count(row.parameters), row.parameters),
            Cell(percent(row.accuracy, 2), row.accuracy),
            Cell(f"{row.as_dict()['loss']:.3f}", row.as_dict()["loss"]),
        ]
        for row in rows
    ]
    return table(title, detail, head, cells)


def _retrained(parts: RunParts) -> Markup:
    head = [
        Cell("subnet"),
        Cell("multiply-adds"),
        Cell("parameters"),
        Cell("before"),
        Cell("after"),
        Cell("gain, points"),
        Cell("how", words=True),
    ]
    rows = []
    for part in parts.retrained:
        gain = math.nan if part.before is None else 100 * (part.after.accuracy - part.before.accuracy)
        rows.append(
            [
                Cell(part.name),
                Cell(count(part.after.multiply_adds), part.after.multiply_adds),
                Cell(count(part.after.parameters), part.after.parameters),
                Cell(
                    percent(part.before.accuracy, 2) if part.before else "–",
                    part.before.accuracy if part.before else None,
                ),
                Cell(percent(part.after.accuracy, 2), part.after.accuracy),
                Cell(f"{gain:+.2f}" if math.isfinite(gain) else "–", gain),
                Cell(part.how or "–", words=True),
            ]
        )
    return table("Trained alone", "Held-out accuracy with the supernet's weights, and after training alone", head, rows)


def training_section(parts: RunParts) -> Section:
    """Curves of the training."""
    charts = [loss_chart(parts), progress_chart(parts), *pace_charts(parts)]
    body = []
    if not any(charts):
        body.append(missing("No epoch is recorded yet:", parts.command("train", "--resume")))
    elif not parts.finished:
        done = max((epoch.epoch for epoch in parts.epochs), default=0)
        text = f"The training is not finished: {done} of {parts.config.get('epochs', '?')} epochs are done. Go on with"
        body.append(missing(text, parts.command("train", "--resume")))
    figures = [figure(chart) for chart in (*charts, retraining_chart(parts)) if chart]
    return Section("training", "Training", (*body, pair(*figures)))


def latency_section(parts: RunParts) -> Section:
    """How well predicted times fit measured ones."""
    chart, report = latency_chart(parts), parts.latency
    if chart is None or report is None:
        code = f'json.dump(dataclasses.asdict(table.check()), open("{parts.path / "latency.json"}", "w"))'
        line = missing("No latency was checked yet; with a fastslim.cost.LatencyTable:", code)
        return Section("latency", "Latency", (line,))
    head = [Cell("multiply-adds"), Cell("predicted, ms"), Cell("measured, ms"), Cell("error")]
    rows = [
        [
            Cell(count(row.multiply_adds), row.multiply_adds),
            Cell(f"{row.predicted:.3f}", row.predicted),
            Cell(f"{row.measured:.3f}", row.measured),
            Cell(f"{100 * row.error:+.1f} %", row.error),
        ]
        for row in report.rows
    ]
    detail = (
        f"Relative error: median {percent(report.median_error)}, largest {percent(report.largest_error)}; rank "
        f"correlation {report.rank_correlation:.3f}, of multiply-adds {report.rank_correlation_of_multiply_adds:.3f}"
    )
    if report.drift != 1:
        detail += f"; the machine took {report.drift:.2f} times as long as when the table was measured"
    return Section(
        "latency", "Latency", (pair(figure(chart), table("Checked subnets", detail, head, rows), alike=False),)
    )


def export_section(parts: RunParts) -> Section:
    """The exported files."""
    if not parts.exported:
        return Section(
            "export",
            "Export",
            (missing("Nothing was exported yet:", parts.command("export", "--format subnet,pt2,onnx")),),
        )
    head = [Cell("file"), Cell("format", words=True), Cell("size"), Cell("max abs difference"), Cell("largest output")]
    rows = [
        [
            Cell(file.name, wrap=True),
            Cell(file.format, words=True),
            Cell("no longer there" if file.size is None else format_bytes(file.size), file.size),
            Cell(_difference(file.difference), file.difference),
            Cell("–" if file.scale is None else f"{file.scale:.3g}", file.scale),
        ]
        for file in parts.exported
    ]
    detail = "Difference: between outputs of the file and of the network it was made of"
    return Section("export", "Export", (table("Exported files", detail, head, rows),))


def _difference(value: float | None) -> str:
    if value is None:
        return "not compared"
    return f"{value:.1e}" if value else "0"
