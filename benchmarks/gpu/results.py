"""The result file of benchmarks/gpu/run.sh: one JSON document and its Markdown page, rewritten after every table.

python benchmarks/gpu/results.py FOLDER FILE...   merges the files of a run that was made in pieces into FOLDER
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("build", "first", "test", "sanitize", "kernels", "step")


def machine() -> dict[str, str]:
    """Device, driver and versions; imports neither torch nor fastslim, which may not be installed yet."""
    query = "--query-gpu=name,driver_version,memory.total"
    gpu = [part.strip() for part in _output("nvidia-smi", query, "--format=csv,noheader").split("\n")[0].split(",")]
    device, driver, memory = gpu if len(gpu) == 3 else ("no GPU", "none", "none")
    release = re.search(r"release ([\d.]+)", _output(nvcc() or "nvcc", "--version"))
    return {
        "device": device,
        "driver": driver,
        "memory": memory,
        "cpu": f"{_cpu()}, {os.cpu_count()} threads",
        "torch": _version("torch"),
        "triton": _version("triton"),
        "nvcc": release[1] if release else "none",
        "python": platform.python_version(),
        "commit": commit(),
        "date": now(),
    }


def now() -> str:
    """The time in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def commit() -> str:
    """The commit that is measured; FASTSLIM_COMMIT names it in a copy without .git."""
    return _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or os.environ.get(
        "FASTSLIM_COMMIT", "unknown"
    )


def nvcc() -> str | None:
    """The CUDA compiler, found as setup.py finds it."""
    home = os.environ.get("CUDA_HOME")
    candidates = (os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", shutil.which("nvcc"))
    usual = "/usr/local/cuda/bin/nvcc"
    return next((path for path in (*candidates, usual) if path and Path(path).exists()), None)


def stem(about: dict[str, str]) -> str:
    """``<device>-<commit>``, as a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", about["device"]).strip("-") + "-" + about["commit"]


def write(path: Path, text: str) -> None:
    """Replaces a file in one go: a run that is killed leaves the old or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


class Result:
    """A result file.

    Args:
        path: of the JSON; the Markdown page stands beside it. None keeps the result in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        known = path is not None and path.exists()
        self.content: dict[str, Any] = json.loads(path.read_text()) if known else {"machine": {}, "stages": {}}

    def save(self) -> None:
        """Writes both files."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write(self.path, json.dumps(self.content, indent=1) + "\n")
            write(self.path.with_suffix(".md"), markdown(self.content))


class Stage:
    """One stage's part of a result file; every addition is written at once and printed.

    Args:
        result: path of the result file, or None.
        name: of the stage.
    """

    def __init__(self, result: Path | None, name: str) -> None:
        self.result = Result(result)
        self.name = name
        self.content: dict[str, Any] = self.result.content["stages"].setdefault(name, {})

    def start(self) -> None:
        """Forgets what an earlier run of the stage has left."""
        self.content.clear()
        self.content.update(status="started, but did not end", date=now(), notes=[], tables=[], data={})
        self.result.save()

    def note(self, text: str) -> None:
        """A line of text."""
        print(text, flush=True)
        self.content.setdefault("notes", []).append(text)
        self.result.save()

    def table(self, title: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A table; a second one with the same title replaces the first."""
        made = {"title": title, "columns": columns, "rows": [[_plain(cell) for cell in row] for row in rows]}
        print("\n".join(_table(made)), flush=True)
        tables = self.content.setdefault("tables", [])
        tables[:] = [table for table in tables if table["title"] != title] + [made]
        self.result.save()

    def data(self, key: str, value: Any) -> None:
        """Something only a program reads."""
        self.content.setdefault("data", {})[key] = value
        self.result.save()

    def end(self, status: str, seconds: float) -> None:
        """How it went."""
        self.content.update(status=status, seconds=round(seconds, 1))
        self.result.save()


def markdown(content: dict[str, Any]) -> str:
    """The page a person reads."""
    about, stages = content["machine"], content["stages"]
    lines = [f"# {about.get('device', 'unknown device')}, commit {about.get('commit', 'unknown')}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in about.items() if key not in ("device", "commit")), ""]
    named = [name for name in STAGES if name in stages] + sorted(set(stages) - set(STAGES))
    lines += ["| stage | result | seconds | when |", "|---|---|--:|---|"]
    for name in named:
        stage = stages[name]
        lines.append(f"| {name} | {stage.get('status', '')} | {stage.get('seconds', '')} | {stage.get('date', '')} |")
    for name in named:
        stage = stages[name]
        lines += ["", f"## {name}", ""]
        lines += [f"- {note}" for note in stage.get("notes", [])]
        for table in stage.get("tables", []):
            lines += ["", *_table(table)]
        if stage.get("log"):
            lines += ["", "```", stage["log"].rstrip().replace("```", "'''"), "```"]
    return "\n".join(lines) + "\n"


def merged(contents: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of several: a later file's stage replaces an earlier one's.

    Raises:
        SystemExit: they come from different commits or devices.
    """
    whole: dict[str, Any] = {"machine": {}, "stages": {}}
    for content in contents:
        for key in ("device", "commit"):
            before = whole["machine"].get(key, content["machine"].get(key))
            if before != content["machine"].get(key):
                raise SystemExit(f"the files are of different {key}s: {before} and {content['machine'].get(key)}")
        whole["machine"].update(content["machine"])
        whole["stages"].update(content["stages"])
    return whole


def _table(table: dict[str, Any]) -> list[str]:
    columns, rows = table["columns"], table["rows"]
    numeric = [
        bool(rows) and all(isinstance(row[i], int | float) or row[i] == "" for row in rows) for i in range(len(columns))
    ]
    rule = "|" + "|".join("--:" if right else "---" for right in numeric) + "|"
    body = ["| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return [f"**{table['title']}**", "", "| " + " | ".join(columns) + " |", rule, *body]


def _plain(cell: Any) -> Any:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return float(f"{cell:.3g}") if abs(cell) < 100 else round(cell)
    return cell if isinstance(cell, int) else str(cell)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text()) if path.exists() else None
    return found[1] if found else platform.processor()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def main(folder: str, *files: str) -> None:
    """Merges result files, with what the folder has of the same commit and device."""
    parts = [json.loads(Path(file).read_text()) for file in files]
    target = Result(Path(folder) / f"{stem(parts[0]['machine'])}.json")
    target.content = merged([*([target.content] if target.content["machine"] else []), *parts])
    target.save()
    print(target.path)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
