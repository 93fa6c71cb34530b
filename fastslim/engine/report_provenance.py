"""Where the numbers of a report come from."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from pathlib import Path

from fastslim.engine.config import TrainConfig
from fastslim.engine.report_markup import Markup, element, join
from fastslim.engine.report_page import Cell, table
from fastslim.engine.report_parts import RunParts
from fastslim.engine.stage_folder import origin
from fastslim.errors import FastslimError

ROOT = Path(__file__).resolve().parents[2]


def provenance(parts: RunParts) -> Markup:
    """Machine, versions, commit, dates and configuration."""
    here = origin()
    lines = {
        "trained on": parts.machine,
        "trained with": _versions(parts.versions) if parts.versions else None,
        "trained until": _date(parts.results_time),
        "report made on": here["machine"],
        "report made with": _versions(here["versions"]),
        "commit": commit(),
        "report made": _date(datetime.datetime.now().astimezone()),
        "run folder": str(parts.path.resolve()),
    }
    listed = [piece for name, text in lines.items() if text for piece in (element("dt", name), element("dd", text))]
    return join(element("strong", "Where these numbers come from"), element("dl", *listed), _config(parts))


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _date(moment: datetime.datetime | None) -> str | None:
    return moment.strftime("%Y-%m-%d %H:%M %Z").strip() if moment else None


def _config(parts: RunParts) -> Markup | None:
    """All options, first those that are not as usual."""
    if not parts.config:
        return None
    try:
        usual = TrainConfig().as_dict()
    except FastslimError:
        usual = {}
    names = sorted(parts.config, key=lambda name: name in usual and usual[name] == parts.config[name])
    rows = [
        [
            Cell(str(name)),
            Cell(_value(parts.config[name]), words=True, wrap=True),
            Cell(_value(usual[name]) if name in usual else "–", words=True, wrap=True),
        ]
        for name in names
    ]
    head = [Cell("option"), Cell("value", words=True), Cell("usually", words=True)]
    listed = table("Configuration", "Options that differ from the usual ones come first", head, rows)
    return element("details", element("summary", f"Configuration, {len(rows)} options"), listed)


def _value(value: object) -> str:
    """As one would write it in YAML, numbers in four digits."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "unset"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def commit() -> str | None:
    """The commit of fastslim, where it is run from its repository or FASTSLIM_COMMIT names it."""
    named = os.environ.get("FASTSLIM_COMMIT")
    if named or not (ROOT / ".git").exists():
        return named
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):  # no git here
        return None
    return found.stdout.strip() or None
