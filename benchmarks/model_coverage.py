"""Tries `fastslim.convert` on public models and writes results/model_coverage.json and docs/model-coverage.md.

    python benchmarks/model_coverage.py --only timm/resnet

Needs the collections it looks at (timm, torchvision, transformers, ...) in the environment; those that are missing
are skipped. Every model runs in a process of its own; what was measured at this commit is not measured again.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import torch  # noqa: E402
from survey.measure import measure  # noqa: E402
from survey.models import PACKAGES, SurveyModel, survey_models  # noqa: E402
from survey.page import write_page  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "model_coverage.json"
PAGE = ROOT / "docs" / "model-coverage.md"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns or parts of collection/model names")
    parser.add_argument("--again", action="store_true", help="measure also what was measured at this commit")
    parser.add_argument("--failed", action="store_true", help="measure only what failed last time")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--timeout", type=float, default=240, help="seconds a model may take")
    parser.add_argument("--memory", type=float, default=6, help="GiB a model may take")
    parser.add_argument("--page", action="store_true", help="only write the page from the results")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(options.results.read_text()) if options.results.exists() else {}
    if not options.page:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        pending = [entry for entry in survey_models() if _wanted(entry, options, results.get("models", {}), commit)]
        random.Random(0).shuffle(pending)  # what an interrupted survey has done is a fair sample
        _survey(pending, options, results, commit)
    if options.results == RESULTS:
        PAGE.write_text(write_page(results, survey_models()))


def _wanted(entry: SurveyModel, options: argparse.Namespace, known: dict[str, Any], commit: str) -> bool:
    before = known.get(entry.key, {})
    if not any(fnmatch.fnmatch(entry.key, pattern) or pattern in entry.key for pattern in options.only):
        return False
    if options.failed:
        return before.get("ok") is False
    return options.again or before.get("commit") != commit


def _survey(pending: list[SurveyModel], options: argparse.Namespace, results: dict[str, Any], commit: str) -> None:
    models = results.setdefault("models", {})
    running: dict[int, tuple[SurveyModel, float, Path]] = {}
    done, start = 0, time.time()
    while pending or running:
        while pending and len(running) < options.jobs:
            entry = pending.pop(0)
            package = PACKAGES[entry.collection]
            try:
                importlib.import_module(package)
            except ImportError as error:
                print(f"\r{entry.key}: skipped, {error}", file=sys.stderr)
                continue
            file = Path(tempfile.mkstemp(suffix=".json")[1])
            pid = os.fork()
            if pid == 0:
                _child(entry, file, options.memory)
            running[pid] = (entry, time.time(), file)
        for pid, (entry, since, file) in list(running.items()):
            finished, status = os.waitpid(pid, os.WNOHANG)
            if not finished and time.time() - since > options.timeout:
                os.kill(pid, signal.SIGKILL)
                finished, status = os.waitpid(pid, 0)
            if not finished:
                continue
            del running[pid]
            done += 1
            models[entry.key] = {**_result(entry, file, status), "commit": commit}
            mark = "ok  " if models[entry.key]["ok"] else "FAIL"
            error = models[entry.key].get("error", "")[:140].replace("\n", " ")
            print(f"\r{mark} {entry.key} {time.time() - since:.1f} s {error}", flush=True)
            results["versions"] = _versions()
            options.results.write_text(json.dumps(results, indent=1) + "\n")
        left = len(pending) + len(running)
        if sys.stderr.isatty():
            print(f"\r{done} of {done + left} models, {time.time() - start:.0f} s ", end="", file=sys.stderr)
        time.sleep(0.05)


def _child(entry: SurveyModel, file: Path, memory: float) -> None:
    """Measures one model and leaves."""
    resource.setrlimit(resource.RLIMIT_AS, (int(memory * 2**30),) * 2)
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        file.write_text(json.dumps(measure(entry)))
    except BaseException as error:
        file.write_text(json.dumps({"ok": False, "stage": "survey", "error": repr(error)[:500]}))
    finally:
        os._exit(0)


def _result(entry: SurveyModel, file: Path, status: int) -> dict[str, Any]:
    text = file.read_text()
    file.unlink()
    base = {"collection": entry.collection, "name": entry.name, "kind": entry.kind}
    if not text:
        reason = f"killed by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "ended without a word"
        return {**base, "ok": False, "stage": "process", "error": f"{reason} (time or memory limit)"}
    return {**base, **json.loads(text)}


def _versions() -> dict[str, Any]:
    versions: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0], "cores": os.cpu_count()}
    for collection, package in PACKAGES.items():
        module = sys.modules.get(package.split(".")[0])
        if module is not None:
            versions[collection] = str(getattr(module, "__version__", ""))
    return versions


if __name__ == "__main__":
    main()
