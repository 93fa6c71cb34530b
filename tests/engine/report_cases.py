"""A run's folder as training, searching, retraining, exporting and a check of latencies leave it; written by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

FULL = {"stem_(0, 32)_32": 32, "layer1.0.conv1_(0, 64)_64": 64, "layer2.0.conv1_(0, 128)_128": 128}
ORIGIN = {"versions": {"fastslim": "0.1.0", "torch": "2.13.0+cpu"}, "machine": "x86_64, 2 threads"}
RATIOS = (0.25, 0.5, 0.75, 1.0)
EPOCHS = 6
BUDGETS = (("flops", 0.5), ("flops", 0.25), ("parameters", 0.5))


def costs(widths: dict[str, int]) -> dict[str, int]:
    """Costs of a made-up network: products of neighbouring widths."""
    stem, first, second = widths.values()
    parameters = 27 * stem + 9 * stem * first + 9 * first * second + 10 * second
    return {"flops": 1024 * 27 * stem + 9 * 256 * stem * first + 9 * 64 * first * second, "parameters": parameters}


def accuracy(widths: dict[str, int]) -> float:
    """Grows with the width, and slower from width to width."""
    return 0.985 - 0.12 * math.exp(-costs(widths)["flops"] / 1.5e6)


def scaled(ratio: float) -> dict[str, int]:
    return {name: int(ratio * channels) for name, channels in FULL.items()}


def measures(widths: dict[str, int], gain: float = 0.0) -> dict[str, Any]:
    """The columns of a table of results."""
    found = costs(widths)
    right = accuracy(widths) + gain
    return {
        "multiply_adds": found["flops"],
        "parameters": found["parameters"],
        "accuracy": right,
        "loss": 3 * (1 - right),
    }


def subnets() -> list[dict[str, int]]:
    choices = (0.25, 0.5, 0.75, 1.0)
    return [
        {name: int(ratio * FULL[name]) for name, ratio in zip(FULL, (a, b, c), strict=True)}
        for a in choices
        for b in choices
        for c in choices
    ]


def scored(widths: dict[str, int]) -> dict[str, Any]:
    wobble = 0.004 * math.sin(sum(index * width for index, width in enumerate(widths.values(), 1)))
    return {"subnet": widths, "costs": costs(widths), "score": accuracy(widths) + wobble - 0.002}


def found(cost: str, budget: float) -> dict[str, Any]:
    """The best subnet within a budget."""
    limit = budget * costs(FULL)[cost]
    best = max((scored(s) for s in subnets() if costs(s)[cost] <= limit), key=lambda one: one["score"])
    return {"cost": cost, "budget": budget, "limit": limit, **best}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def write_training(run: Path, model: str = "resnet18", finished: bool = True) -> None:
    """config.yaml, metrics.jsonl and results.json."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(
        f"model: {json.dumps(model)}\ndata: digits\nepochs: {EPOCHS}\nlr: 0.1\n", encoding="utf-8"
    )
    lines = []
    for epoch in range(1, EPOCHS + 1):
        loss = 2.3 * math.exp(-0.5 * epoch)
        losses = {
            "max_subnet.loss": loss,
            "min_subnet.loss_kl": 0.8 * loss,
            "random_subnet_0.loss_kl": 0.5 * loss,
            "random_subnet_1.loss_kl": 0.7 * loss,
        }
        record = {"kind": "epoch", "epoch": epoch, "step": 11 * epoch, "lr": 0.1 / epoch, "losses": losses}
        lines.append({**record, "images_per_second": 410.0 + epoch})
        rows = [{"width": ratio, **measures(scaled(ratio), -0.4 / 4**epoch / ratio)} for ratio in RATIOS]
        lines.append({"kind": "evaluation", "epoch": epoch, "step": 11 * epoch, "widths": rows})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if finished:
        widths = [{"width": ratio, **measures(scaled(ratio))} for ratio in RATIOS]
        write(run / "results.json", {"finished": True, "widths": widths, "training_seconds": 83.4, **ORIGIN})


def write_search(run: Path, folder: str = "search", method: str = "greedy", held_out: bool = True) -> None:
    """report.json, and results.json with held-out accuracies."""
    report = {
        "format": "fastslim-search-report-1",
        "method": method,
        "metric": "accuracy",
        "full": scored(FULL),
        "found": [found(cost, budget) for cost, budget in BUDGETS],
        "evaluated": [scored(subnet) for subnet in subnets()],
    }
    write(run / folder / "report.json", report)
    lines = "".join(json.dumps(scored(subnet)) + "\n" for subnet in subnets())
    (run / folder / "evaluated.jsonl").write_text(lines, encoding="utf-8")
    if held_out:
        rows = [
            {
                "name": f"{one['cost']}-{one['budget']:g}",
                **measures(one["subnet"]),
                **{key: one[key] for key in ("cost", "budget", "score", "subnet")},
                "uniform": {"name": "width-0.75", **measures(scaled(0.75))},
            }
            for one in report["found"]
        ]
        content = {"finished": True, "scored_on": "144 images left out of the training", "subnets": rows}
        write(run / folder / "results.json", {**content, "options": {}, "made_of": {}, **ORIGIN})


def write_retrained(run: Path) -> None:
    """The first two found subnets, trained on alone."""
    for cost, budget in BUDGETS[:2]:
        name, widths = f"{cost}-{budget:g}", found(cost, budget)["subnet"]
        folder = run / "retrain" / name
        before, after = ({"name": name, **measures(widths, gain)} for gain in (0.0, 0.006))
        content = {"finished": True, "start": "supernet", "distill": True, "before": before, "after": after}
        write(folder / "results.json", {**content, **ORIGIN})
        lines = [
            {"kind": "evaluation", "epoch": e, "step": e, "subnets": [{"name": name, **measures(widths, -0.01 / e)}]}
            for e in (1, 2, 3)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_export(run: Path) -> None:
    """A subnet, two programs, and a file that was written by hand."""
    export = run / "export"
    subnet = export / "flops-0.5"
    write(subnet / "subnet.json", {"format": "fastslim-subnet-1"})
    (subnet / "weights.safetensors").write_bytes(b"w" * 120_000)
    rows = [("subnet", "flops-0.5", 1.9e-6), ("pt2", "flops-0.5.pt2", 0.0), ("onnx", "flops-0.5.onnx", 2.4e-6)]
    for _, name, _ in rows[1:]:
        (export / name).write_bytes(b"p" * 131_000)
    (export / "by_hand.pt2").write_bytes(b"p" * 1_500_000)
    files = [
        {"subnet": "flops-0.5", "format": kind, "path": name, "bytes": 131_000, "difference": gap, "scale": 11.5,
         "tolerance": 1e-5}
        for kind, name, gap in rows
    ]  # fmt: skip
    write(export / "export.json", {"finished": True, "files": files, "subnets": [], "options": {}, "made_of": {}})


def write_latency(run: Path) -> None:
    """A check of predicted times."""
    rows = [
        {"subnet": s, "multiply_adds": costs(s)["flops"], "predicted": t * (1 + e), "measured": t}
        for s, e in zip(subnets()[::5], (0.02, -0.05, 0.01, 0.08, -0.03) * 3, strict=False)
        for t in [0.3 + costs(s)["flops"] / 4e6]
    ]
    write(run / "latency.json", {"rows": rows, "where": "Xeon, 2 threads, float32, batch size 1"})


def write_run(run: Path) -> Path:
    """All parts."""
    write_training(run)
    write_search(run)
    write_search(run, "search-evolution", "evolution", held_out=False)
    write_retrained(run)
    write_export(run)
    write_latency(run)
    return run
