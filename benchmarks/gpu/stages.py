"""Runs the stages of benchmarks/gpu/run.sh, each with a time limit; a stage that fails does not stop the next.

In a copy without .git, FASTSLIM_COMMIT names the commit. Results of a run in pieces: see results.py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import results
from results import ROOT, STAGES, Result, Stage

HERE = Path(__file__).resolve().parent
#: Seconds; together less than half an hour.
LIMITS = {"build": 180, "first": 150, "test": 300, "sanitize": 220, "kernels": 330, "step": 560}
LOG_LINES = 60


class Done(NamedTuple):
    """What a command left: its exit status (None: it ran out of time) and the end of its output."""

    code: int | None
    tail: str


class Context:
    """What all stages share.

    Args:
        result: path of the result file.
        dry: rehearse on a machine without a GPU.
        record: let the kernels stage write the dispatch table.
    """

    def __init__(self, result: Path, dry: bool, record: bool) -> None:
        self.result, self.dry, self.record = result, dry, record
        self.deadline = 0.0
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self.environment["PYTHONPATH"] = self.environment["PYTHONPATH"].rstrip(os.pathsep)
        self.environment["FASTSLIM_COMMIT"] = results.commit()

    def run(self, *command: str | Path, **variables: str) -> Done:
        """Runs a command within the stage's time, its output printed and logged."""
        words = [str(word) for word in command]
        print("$", *(f"{key}={value}" for key, value in variables.items()), *words, flush=True)
        log = self.result.with_suffix(".log")
        environment = {**self.environment, **variables}
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, text=True, errors="replace", start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        lines: list[str] = []

        def read() -> None:
            with log.open("a") as file:
                print("$", *words, file=file)
                for line in process.stdout or ():
                    print(line, end="", flush=True)
                    file.write(line)
                    file.flush()
                    lines.append(line)
                    del lines[:-LOG_LINES]

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            code: int | None = process.wait(max(1.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # workers it may have left, too
            process.wait()
        reader.join(5)
        return Done(code, "".join(lines))

    def script(self, name: str, *arguments: str) -> Done:
        """Runs one of the scripts beside this one, which adds to the result file by itself."""
        dry = ["--dry-run"] if self.dry else []
        return self.run(sys.executable, HERE / name, "--result", self.result, *dry, *arguments)


def outcome(stage: Stage, done: Done) -> str:
    """The status of a stage after its last command; keeps the output of one that failed."""
    if done.code == 0:
        return "ok"
    stage.content["log"] = done.tail
    stage.result.save()
    return "out of time" if done.code is None else f"failed (exit status {done.code})"


def build(context: Context) -> str:
    """Builds in place with CUDA: editable by pip, else by setup.py."""
    stage = Stage(context.result, "build")
    missing = [name for name in ("pybind11", "setuptools") if not importlib.util.find_spec(name)]
    missing += [name for name in ("cmake",) if not shutil.which(name)]
    if missing:
        stage.note(f"not built: {', '.join(missing)} missing")
        return "left out"
    cuda = results.nvcc() is not None
    if not cuda:
        stage.note("nvcc is missing: built without the CUDA C++ kernels")
    variables = {"FASTSLIM_CUDA": str(int(cuda))}
    if context.dry:  # beside the checkout: a rehearsal changes nothing that is in use
        if not cuda:
            return "left out"
        with tempfile.TemporaryDirectory() as folder:
            done = context.run(sys.executable, "setup.py", "build_ext", "--build-lib", folder, **variables)
            built = sorted(path.name for path in Path(folder).rglob("*.so"))
        stage.note(f"built {', '.join(built) or 'nothing'}")
        return outcome(stage, done)
    pip = "-m", "pip", "install", "--disable-pip-version-check", "--no-index", "--no-build-isolation", "--no-deps"
    done = context.run(sys.executable, *pip, "-e", ".", **variables)
    if done.code != 0:
        stage.note("pip could not install: built in place instead")
        done = context.run(sys.executable, "setup.py", "build_ext", "--inplace", **variables)
        link = ROOT / "fastslim" / "kernels"
        if not link.exists():  # what an editable install maps fastslim.kernels to
            link.symlink_to("../kernels")
    status = outcome(stage, done)
    if status == "ok":
        info = context.run(sys.executable, "-m", "fastslim.info")
        stage.content["log"] = info.tail
        stage.result.save()
        status = "ok" if info.code == 0 else outcome(stage, info)
    return status


def test(context: Context) -> str:
    """pytest -m gpu; a rehearsal collects."""
    stage = Stage(context.result, "test")
    if not importlib.util.find_spec("pytest"):
        stage.note("pytest is missing")
        return "left out"
    if not importlib.util.find_spec("hypothesis"):
        stage.note("hypothesis is missing: test files that need it are reported as errors")
    # Without the project's addopts, which want pytest-benchmark.
    pytest = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-m", "gpu", "tests"]
    if context.dry:
        done = context.run(*pytest, "--collect-only", "-q")
        stage.note("collected: " + (done.tail.strip().splitlines() or ["nothing"])[-1])
        return outcome(stage, done)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [*pytest, "-q", "-rfE", "--tb=short", "--continue-on-collection-errors", f"--junitxml={report}"]
        done = context.run(*command)
        if report.exists():
            _report(stage, report)
    return outcome(stage, done)


def _report(stage: Stage, report: Path) -> None:
    cases = ElementTree.parse(report).getroot().iter("testcase")
    kinds = {"passed": 0, "failed": 0, "error": 0, "skipped": 0}
    wrong, skipped = [], {}
    for case in cases:
        child = next((c for c in case if c.tag in ("failure", "error", "skipped")), None)
        kind = "passed" if child is None else {"failure": "failed"}.get(child.tag, child.tag)
        kinds[kind] += 1
        message = "" if child is None else (child.get("message") or "").split("\n")[0][:200]
        if kind in ("failed", "error"):
            wrong.append([f"{case.get('classname')}::{case.get('name')}", kind, message])
        elif kind == "skipped":
            skipped[message] = skipped.get(message, 0) + 1
    stage.note(", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    for reason, count in skipped.items():
        stage.note(f"{count} skipped: {reason}")
    if wrong:
        stage.table("what failed", ["test", "kind", "message"], wrong)


def sanitize(context: Context) -> str:
    """The CUDA C++ kernels on small shapes under compute-sanitizer."""
    stage = Stage(context.result, "sanitize")
    compiler = results.nvcc()
    beside = Path(compiler).with_name("compute-sanitizer") if compiler else None
    program = shutil.which("compute-sanitizer") or (str(beside) if beside and beside.exists() else None)
    statuses = []
    for tool in ("memcheck", "racecheck"):
        command = [program or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        # Every allocation by itself, so that an access next to a tensor is found.
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        if context.dry or program is None:
            words = " ".join([*command, "python", "benchmarks/gpu/sanitize.py"])
            stage.note(f"would run: PYTORCH_NO_CUDA_MEMORY_CACHING=1 {words}")
            continue
        done = context.run(*command, sys.executable, HERE / "sanitize.py", **variables)
        statuses.append(outcome(stage, done))
        summary = [line for line in done.tail.splitlines() if "SUMMARY" in line or line.startswith("ran ")]
        stage.note(f"{tool}: {statuses[-1]}; {' '.join(summary)}")
    if context.dry:
        return outcome(stage, context.run(sys.executable, HERE / "sanitize.py", "--dry-run"))
    if program is None:
        stage.note("compute-sanitizer is missing")
        return "left out"
    return next((status for status in statuses if status != "ok"), "ok")


def first(context: Context) -> str:
    """The first questions."""
    return _script(context, "first")


def kernels(context: Context) -> str:
    """Every op by every backend."""
    record = ["--record"] if context.record and not context.dry else []
    return _script(context, "kernels", "--seconds", str(LIMITS["kernels"] - 30), *record)


def step(context: Context) -> str:
    """The whole step against its rivals."""
    return _script(context, "step", "--seconds", str(LIMITS["step"] - 60))


def _script(context: Context, name: str, *arguments: str) -> str:
    done = context.script(f"{name}.py", *arguments)
    return outcome(Stage(context.result, name), done)  # read again: the script has added to it


RUN: dict[str, Callable[[Context], str]] = {
    "build": build, "first": first, "test": test, "sanitize": sanitize, "kernels": kernels, "step": step
}  # fmt: skip


def gpu_problem() -> str | None:
    """Why this machine cannot run the stages for real, or None."""
    if results.machine()["device"] == "no GPU":
        return "nvidia-smi is missing or finds no GPU"
    if not importlib.util.find_spec("torch"):
        return f"{sys.executable} has no torch; PYTHON names another interpreter"
    return None


def main(arguments: list[str] | None = None) -> int:
    """Runs the stages; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu/run.sh", description=__doc__)
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)}; all by default")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on a machine without a GPU")
    parser.add_argument("--record", action="store_true", help="write the dispatch table from the kernels stage")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.stages if name not in STAGES]
    if unknown:
        parser.error(f"no stage {unknown[0]!r}; known are {', '.join(STAGES)}")
    dry = options.dry_run or os.environ.get("FASTSLIM_DRY_RUN", "0") not in ("", "0")
    if not dry and (problem := gpu_problem()):
        parser.error(f"needs an NVIDIA GPU: {problem}; --dry-run rehearses without one")
    out = options.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    if dry and (out is None or out.resolve() == ROOT / "benchmarks/results"):
        out = Path(tempfile.mkdtemp(prefix="fastslim-dry-run-"))
    out = (out or ROOT / "benchmarks/results").resolve()
    out.mkdir(parents=True, exist_ok=True)
    about = results.machine()
    path = out / f"{'dry-run-' * dry}{results.stem(about)}.json"
    whole = Result(path)
    whole.content["machine"] = about
    whole.save()
    context = Context(path, dry, options.record)
    worst = 0
    for name in options.stages or STAGES:
        print(f"== {name}", flush=True)
        Stage(path, name).start()
        begin = time.monotonic()
        context.deadline = begin + LIMITS[name] * (10 if dry else 1)
        try:
            status = RUN[name](context)
        except Exception as error:  # the later stages still run
            Stage(path, name).note(f"{type(error).__name__}: {error}")
            status = "failed"
        stage = Stage(path, name)
        stage.end(status, time.monotonic() - begin)
        print(f"== {name}: {status}, {stage.content['seconds']} s", flush=True)
        worst |= status not in ("ok", "left out")
    print(f"results: {path} {path.with_suffix('.md')}")
    return worst


if __name__ == "__main__":
    sys.exit(main())
