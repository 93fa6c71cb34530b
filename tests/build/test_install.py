"""Installs in every supported way, twice in a row, into throw-away environments that share this one's torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__")
TRY_IT = """
import importlib.metadata, importlib.util, json, torch
import fastslim, fastslim.kernels
from fastslim import _ext
files = [str(path) for path in importlib.metadata.files("fastslim")]
print(json.dumps({"library": _ext.BUILD, "cuda": _ext.CUDA_UNUSABLE, "torch": torch.__version__,
    "files": files, "stray": [name for name in ("kernels", "tests", "csrc") if importlib.util.find_spec(name)]}))
"""


class Environment:
    """A fresh virtual environment that sees this one's packages."""

    def __init__(self, folder: Path, sources: Path) -> None:
        self.folder, self.sources = folder, sources
        venv.create(folder / "env", with_pip=True)
        self.python = folder / "env" / "bin" / "python"
        site = self._run([self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).stdout.strip()
        self.shared = Path(site) / "shared.pth"
        self.shared.write_text(sysconfig.get_path("purelib"))

    def hide_shared_packages(self) -> None:
        """From now on the environment has nothing but pip."""
        self.shared.unlink()

    def tools_folder(self, *names: str) -> str:
        """A folder to be the whole PATH."""
        folder = self.folder / "tools"
        folder.mkdir()
        for name in names:
            (folder / name).symlink_to(shutil.which(name))
        return str(folder)

    def install(self, *arguments: str, program: tuple[str, ...] = (), **environment: str) -> str:
        """Installs, and returns everything that was printed."""
        command = [*(program or (str(self.python), "-m", "pip", "install", "-v", "--no-deps")), *arguments]
        return self._run(command, cwd=self.sources, **environment).stdout

    def fails(self, **environment: str) -> str:
        """What a failing install prints."""
        command = [self.python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "."]
        return self._run(command, cwd=self.sources, succeeds=False, **environment).stdout

    def try_it(self) -> dict:
        """Imports from another folder; says what was imported."""
        import json

        return json.loads(self._run([self.python, "-c", TRY_IT], cwd=self.python.parent).stdout.splitlines()[-1])

    def _run(self, command, cwd=None, succeeds=True, **environment):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "FASTSLIM_CUDA": "0", "CXX": "g++", "PATH": path, **environment}
        env.pop("PYTHONPATH", None)
        done = subprocess.run(
            list(map(str, command)), cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert (done.returncode == 0) == succeeds, done.stdout
        return done


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of the sources for all tests: each build flavour is compiled once, by the first that needs it."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("install") / "sources", ignore=LEFT_OUT)


@pytest.fixture
def environment(tmp_path, sources):
    return Environment(tmp_path, sources)


def check(environment: Environment) -> dict:
    import torch

    found = environment.try_it()
    assert found["library"]["torch"] == found["torch"] == torch.__version__
    assert not found["stray"]
    return found


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_no_warning_from_our_own_files(environment, compiler):
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    printed = environment.install("--no-build-isolation", ".", CXX=compiler)
    assert "Building CXX object" in printed  # this test stands first: nothing is compiled yet
    assert not re.findall(r"(?:csrc|fastslim)/\S+: warning: .*", printed)
    check(environment)


@pytest.mark.parametrize(
    "arguments",
    [["."], ["--no-build-isolation", "."], ["--no-build-isolation", "-e", "."], ["-e", "."]],
    ids=" ".join,
)
def test_pip_install_twice(environment, arguments):
    for _ in range(2):
        printed = environment.install(*arguments)
        assert "Collecting torch" not in printed
        assert "Downloading torch" not in printed
        check(environment)


@pytest.mark.skipif(not shutil.which("uv"), reason="uv is not installed")
def test_uv_pip_install_twice(environment):
    program = ("uv", "pip", "install", "--python", str(environment.python), "--no-deps", "--no-build-isolation", ".")
    for _ in range(2):
        environment.install(program=program)
        check(environment)


def test_the_wheel_holds_the_package_and_nothing_else(environment):
    environment.install("--no-build-isolation", ".")
    files = check(environment)["files"]
    top = {Path(name).parts[0] for name in files if not name.startswith("..")}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fastslim"}
    expected = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("fastslim/**/*.py")}
    expected |= {f"fastslim/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("kernels/**/*.py")}
    expected |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("fastslim/**/*.yaml")}
    assert expected <= set(files)
    assert "fastslim/py.typed" in files


def test_switching_compiler_and_back_needs_no_clean(environment):
    compilers = [name for name in ("g++", "clang++", "g++") if shutil.which(name)]
    for compiler in compilers:
        environment.install("--no-build-isolation", ".", CXX=compiler)
        built_by = check(environment)["library"]["compiler"].lower()
        assert ("clang" in built_by) == (compiler == "clang++")


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
def test_cuda_builds_without_a_gpu_and_goes_away_again(environment):
    import torch

    environment.install("--no-build-isolation", ".", FASTSLIM_CUDA="1")
    found = check(environment)
    assert "fastslim/_C_cuda.so" in found["files"]
    library = next((environment.sources / "build").rglob("_C_cuda.so"))
    assert b"\0libtorch.so\0" in library.read_bytes(), "torch's CUDA functions would not be found"
    if not torch.version.cuda:
        assert found["cuda"] == "this torch has no CUDA"
    environment.install("--no-build-isolation", ".")
    assert "fastslim/_C_cuda.so" not in check(environment)["files"]


def test_without_a_compiler_one_sentence_says_what_to_install(environment):
    printed = environment.fails(PATH=environment.tools_folder("cmake", "ninja"), CXX="")
    assert "fastslim needs a C++17 compiler, found none: install g++" in printed


def test_a_compiler_that_does_not_exist_is_named(environment):
    assert "CXX=no-such-compiler does not exist" in environment.fails(CXX="no-such-compiler")


def test_without_torch_or_build_tools_one_sentence_says_so(environment):
    tools = ["setuptools", "cmake", "ninja", "pybind11"]
    environment.hide_shared_packages()
    nothing_else = f"{environment.python.parent}{os.pathsep}{environment.tools_folder('g++')}"
    assert f"pip install --upgrade {' '.join(tools)}" in environment.fails(PATH=nothing_else)
    environment.install("--upgrade", *tools)
    assert "is built against your torch, and found none: pip install 'torch>=2.11' first" in environment.fails()
