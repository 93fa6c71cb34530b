"""docs/model-coverage.md from the survey's results."""

from __future__ import annotations

import statistics
from typing import Any

from survey.model import SurveyModel

_ORDER = ("cnn", "hybrid", "transformer")


def write_page(results: dict[str, Any], entries: list[SurveyModel]) -> str:
    """The page as Markdown."""
    known = results.get("models", {})
    models = [known[entry.key] for entry in entries if entry.key in known]
    versions = dict(results.get("versions", {}))
    lines = [
        "# Public models tried",
        "",
        "What `fastslim.convert(model, inputs)` makes of networks that were written without it in mind, with random",
        "weights and small inputs. Written by `benchmarks/model_coverage.py`, which see for the checks; raw data:",
        "[model_coverage.json](../benchmarks/results/model_coverage.json).",
        "",
        *_summary(models),
        "",
        "A model passes when, one after the other:",
        "- conversion changes no key of `state_dict`, and at full width outputs (evaluation and training mode) and",
        "  gradients equal the original's bit for bit;",
        "- it runs at the largest, the smallest and 3 random sets of widths in evaluation and training mode, with",
        "  backward (1 random set where a forward takes more than 0.2 s);",
        "- at each of them it equals the network that `export_subnet` builds of plain layers (largest error below 1e-3",
        "  of the largest output in float32, or what rounding makes of the original; at the smallest widths also 1e-9",
        "  in float64);",
        "- it equals the *original*, unconverted network in which the weights of all absent channels are zero (1e-9 in",
        "  float64, where the model runs in it). Where a layer or RMS norm runs over channels, absent is not zero;",
        "  those units stay full in this check, and networks that average over channels elsewhere, or shuffle them,",
        "  skip it (marked *);",
        "- a deep copy at the smallest widths computes the same.",
        "",
        "Multiply-adds are counted from the operations torch executes (attention products included), not from the",
        "analysis. *Slimmable*: share of the multiply-adds in operations that get smaller. *Smallest*: what is left of",
        "all multiply-adds at the smallest widths (a sixth of the channels, in multiples of 8). *Units*: sets of",
        "channels that change together, and how many may change; the model's output always stays full.",
    ]
    for collection in dict.fromkeys(model["collection"] for model in models):
        rows = [model for model in models if model["collection"] == collection]
        version = versions.get(collection, "")
        lines += ["", f"## {collection} {version}".rstrip(), ""]
        lines.append("| model | layers | units | slimmable | smallest | analysis | stays full, or fails |")
        lines.append("|" + "---|" * 7)
        lines += [_row(model) for model in sorted(rows, key=lambda model: _ORDER.index(model["kind"]))]
    commits = sorted({model["commit"] for model in models})
    lines += [
        "",
        f"torch {versions.get('torch')}, Python {versions.get('python')}, one thread of a machine with "
        f"{versions.get('cores')} cores; commits {', '.join(commits)}.",
    ]
    return "\n".join(lines) + "\n"


def _summary(models: list[dict[str, Any]]) -> list[str]:
    lines = ["| kind | models | pass | slimmable, median | slimmable, least | 90 % or more |", "|" + "---|" * 6]
    for kind in (*_ORDER, "all"):
        rows = [model for model in models if kind in ("all", model["kind"])]
        shares = [model["share"] for model in rows if "share" in model]
        if shares:
            passing = sum(model["ok"] for model in rows)
            lines.append(
                f"| {kind} | {len(rows)} | {passing} ({100 * passing / len(rows):.0f} %) | "
                f"{100 * statistics.median(shares):.1f} % | {100 * min(shares):.1f} % | "
                f"{sum(share >= 0.9 for share in shares)} of {len(shares)} |"
            )
    rigid = [model["name"] for model in models if model.get("share", 1) < 0.01]
    if rigid:
        names = ", ".join(rigid)
        lines += ["", f"In {names} next to nothing can be slimmed; they pass, but stay as wide as they were."]
    return lines


def _row(model: dict[str, Any]) -> str:
    name = model["name"] + ("\\*" if model.get("masked", "equal") != "equal" else "")
    if "share" not in model:
        return f"| {name} | {model.get('layers', '')} | | | | | {_cell(_failure(model))} |"
    smallest = model["min_multiply_adds"] / max(model["multiply_adds"], 1)
    notes = [_failure(model)] if not model["ok"] else []
    reasons = [(reason, count) for reason, count, _ in model["full_width"] if reason != "the model's output"]
    notes += [f"{reason} ({count}x)" if count > 1 else reason for reason, count in reasons[:2]]
    return (
        f"| {name} | {model['layers']} | {model['mutable_units']} of {model['units']} | {100 * model['share']:.1f} % | "
        f"{100 * smallest:.1f} % | {model['analysis_seconds']:.2f} s | {_cell('; '.join(notes))} |"
    )


def _failure(model: dict[str, Any]) -> str:
    return f"**{model.get('stage', '')}: {model.get('error', '')[:160]}**"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
