"""Charts of what happened over the epochs, and of predicted and measured times."""

from __future__ import annotations

from fastslim.engine.report_chart import Axis, Chart, Point, Series, count, count_tick, percent, ramp
from fastslim.engine.report_costs import percent_axis
from fastslim.engine.report_parts import RunParts
from fastslim.engine.report_words import title_of

EPOCHS = Axis("epoch", whole=True)
FEW = 10  # curves that have room for a label at their end


def loss_chart(parts: RunParts) -> Chart | None:
    """The losses of each kind of subnet; None without epochs."""
    curves = losses_by_subnet(parts)
    if not curves:
        return None
    colors = {"max": "blue", "min": "orange", "random": "green"}
    series, seen = [], set()
    for name, values in curves.items():
        kind = name.split()[0]
        color = colors.get(kind, "purple")
        line = "dashed" if color in seen else "straight"
        seen.add(color)
        points = [Point(epoch, value, tip=f"{name}\nepoch {epoch}: {value:.4f}") for epoch, value in values]
        series.append(Series(name, tuple(points), color, line, "circle"))  # type: ignore[arg-type]
    return Chart(
        "losses",
        "Losses",
        "Means over an epoch; random subnets are averaged",
        EPOCHS,
        Axis("loss, nats", zero=all(value >= 0 for values in curves.values() for _, value in values)),
        tuple(series),
    )


def losses_by_subnet(parts: RunParts) -> dict[str, list[tuple[int, float]]]:
    """Curves by name: "max subnet, loss", "min subnet, loss_kl", "random subnets, loss_kl"."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for epoch in parts.epochs:
        groups: dict[str, list[float]] = {}
        for key, value in epoch.losses.items():
            groups.setdefault(_curve(key), []).append(value)
        for name, values in groups.items():
            curves.setdefault(name, []).append((epoch.epoch, sum(values) / len(values)))
    return curves


def _curve(key: str) -> str:
    """``random_subnet_1.loss_kl`` belongs to the curve "random subnets, loss_kl"."""
    subnet, dot, loss = key.partition(".")
    kind, apart, number = subnet.partition("_subnet")
    if not dot or not apart:
        return key
    return f"{kind} subnet{'s' if number else ''}, {loss}"


def progress_chart(parts: RunParts) -> Chart | None:
    """Held-out accuracy of every width over the epochs; None where nothing was evaluated."""
    curves: dict[str, list[Point]] = {}
    for evaluation in parts.evaluations:
        for row in evaluation.widths:
            tip = f"{title_of(row)}\nepoch {evaluation.epoch}: {percent(row.accuracy, 2)}"
            curves.setdefault(title_of(row), []).append(Point(evaluation.epoch, 100 * row.accuracy, tip=tip))
    if not curves:
        return None
    series = [
        Series(
            name,
            tuple(points),
            ramp(index, len(curves)),
            "straight",
            "circle",
            f"{name} {points[-1].y:.1f} %" if len(curves) <= FEW else "",
        )
        for index, (name, points) in enumerate(curves.items())
    ]
    detail = "Held-out images; statistics of batch norm calibrated"
    return Chart(
        "accuracy_epochs", "Accuracy of each width", detail, EPOCHS,
        percent_axis("held-out accuracy"), tuple(series),
    )  # fmt: skip


def retraining_chart(parts: RunParts) -> Chart | None:
    """Held-out accuracy of the retrained subnets over the epochs; None without any."""
    curves = {part.name: part for part in parts.retrained if part.accuracies}
    if not curves:
        return None
    colors = ("green", "blue", "orange", "purple")
    series = [
        Series(
            name,
            tuple(
                Point(epoch, 100 * right, tip=f"{name}\nepoch {epoch}: {percent(right, 2)}")
                for epoch, right in part.accuracies
            ),
            colors[index % len(colors)],
            "dashed" if index // len(colors) % 2 else "straight",
            "circle",
        )
        for index, (name, part) in enumerate(curves.items())
    ]
    return Chart(
        "retraining", "Accuracy of subnets trained alone", "Held-out images", EPOCHS,
        percent_axis("held-out accuracy"), tuple(series),
    )  # fmt: skip


def pace_charts(parts: RunParts) -> list[Chart]:
    """Learning rate and speed over the epochs."""
    if not parts.epochs:
        return []
    rates = [Point(e.epoch, e.lr, tip=f"epoch {e.epoch}: {e.lr:.3g}") for e in parts.epochs]
    speeds = [
        Point(e.epoch, e.images_per_second, tip=f"epoch {e.epoch}: {e.images_per_second:.0f} images/s")
        for e in parts.epochs
    ]
    return [
        Chart(
            "learning_rate", "Learning rate", "At the end of each epoch", EPOCHS,
            Axis("learning rate", zero=True), (Series("", tuple(rates), "purple", "straight", "circle"),),
        ),
        Chart(
            "speed", "Training speed", "A sandwich step counts its images once, though several subnets see them",
            EPOCHS, Axis("images/s", count_tick, zero=True),
            (Series("", tuple(speeds), "purple", "straight", "circle"),),
        ),
    ]  # fmt: skip


def latency_chart(parts: RunParts) -> Chart | None:
    """Predicted against measured times; None without a check."""
    report = parts.latency
    if report is None:
        return None
    points = [
        Point(
            row.measured,
            row.predicted,
            tip=f"{count(row.multiply_adds)} multiply-adds\nmeasured {row.measured:.3g} ms\n"
            f"predicted {row.predicted:.3g} ms ({100 * row.error:+.1f} %)",
        )
        for row in report.rows
    ]
    values = [value for row in report.rows for value in (row.measured, row.predicted)]
    ends = (min(values), max(values))
    far = ends[1] > 8 * ends[0]
    show = "{:.3g}".format
    return Chart(
        "latency",
        "Predicted against measured latency",
        report.where,
        Axis(f"measured, ms{' (log scale)' if far else ''}", show, log=far),
        Axis(f"predicted, ms{' (log scale)' if far else ''}", show, log=far),
        (
            Series("predicted = measured", tuple(Point(end, end) for end in ends), "grey", "dashed"),
            Series(f"{len(points)} subnets", tuple(points), "blue", "none", "circle"),
        ),
    )
