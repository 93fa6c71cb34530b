"""Runs the stages of benchmarks/gpu/run.sh, each with a time limit; a stage that fails does not stop the next.

In a copy without .git, FASTSLIM_COMMIT names the commit. Results of a run in pieces: see results.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import results
from commands import Context, outcome
from results import ROOT, STAGES, Result, Stage

HERE = Path(__file__).resolve().parent
#: Seconds; together less than half an hour.
LIMITS = {"build": 180, "first": 150, "test": 300, "sanitize": 220, "kernels": 330, "step": 560}
CRASHED = 70  # exit status of kernels.py
#: In the order they are asked and timed: what is left when the time is up is the least urgent.
QUESTIONS = ("depthwise", "norm_backend", "baselines", "addmm_into_float32", "packing")
OPS = (
    "depthwise_conv2d", "batch_norm_act", "sandwich_loss", "prefix_pack", "depthwise_conv2d_bn", "slim_linear",
    "slim_conv2d",
)  # fmt: skip


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
        # In parallel for the compilation of Triton's kernels; a worker that loses the GPU is replaced.
        parallel = ["-n", "4", "--dist", "loadfile", "-p", "fresh_worker"] if importlib.util.find_spec("xdist") else []
        shown = "-q", "-rfE", "--tb=short", "--continue-on-collection-errors", f"--junitxml={report}"
        path = os.pathsep.join([str(HERE), context.environment["PYTHONPATH"]])
        done = context.run(*pytest, *parallel, *shown, PYTHONPATH=path)
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
    return _worst(statuses)


def first(context: Context) -> str:
    """The first questions, each in a process of its own: a kernel may leave the GPU unusable to its process."""
    return _scripts(context, "first", [("--question", name) for name in QUESTIONS])


def kernels(context: Context) -> str:
    """Every op by every backend, again without a backend that has crashed."""
    statuses = []
    for op in OPS:
        status = "ok"
        for _ in range(3):
            left = context.deadline - time.monotonic() - 20
            if left < 5:
                Stage(context.result, "kernels").note(f"{op} left out: the stage's time was up")
                break
            status = _scripts(context, "kernels", [("--op", op, "--seconds", f"{left:.0f}")])
            if status != f"failed (exit status {CRASHED})":
                break
        statuses.append(status)
    if context.record and not context.dry:
        statuses.append(
            outcome(Stage(context.result, "kernels"), context.run(sys.executable, HERE / "record.py", context.result))
        )
    return _worst(statuses)


def step(context: Context) -> str:
    """The whole step against its rivals."""
    seconds = (context.deadline - time.monotonic() - 40) / 2
    names = ("resnet50", "mobilenet_v2")
    return _scripts(context, "step", [("--only", name, "--seconds", f"{seconds:.0f}") for name in names])


def _scripts(context: Context, name: str, runs: list[tuple[str, ...]]) -> str:
    """A script of this folder, once with each of some arguments; it adds to the result file by itself."""
    dry = ["--dry-run"] if context.dry else []
    script = [sys.executable, HERE / f"{name}.py", "--result", context.result, *dry]
    # The file is read again: the script has written to it.
    return _worst([outcome(Stage(context.result, name), context.run(*script, *words)) for words in runs])


def _worst(statuses: list[str]) -> str:
    return next((status for status in statuses if status != "ok"), "ok")


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
