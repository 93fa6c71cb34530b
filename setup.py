"""Declares the extension and hands the build to CMakeLists.txt."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PROBE = (
    "import json, os, torch;print(json.dumps([os.path.dirname(torch.__file__), torch.__version__, torch.version.cuda]))"
)
OLDEST_TORCH = (2, 11)


def find_torch() -> tuple[str, str, str | None]:
    """Directory, version and CUDA version of the torch that will run the result.

    That is this process's torch, else (inside pip's build isolation) the environment's, which
    `python -I` sees. Asking pip for torch as a build requirement would download another one.
    """
    for flags in ([], ["-I"]):
        probe = subprocess.run([sys.executable, *flags, "-c", PROBE], capture_output=True, text=True)
        if probe.returncode == 0:
            directory, version, cuda = json.loads(probe.stdout.splitlines()[-1])
            if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
                raise SystemExit(f"fastslim needs torch >= 2.11, found {version}: pip install 'torch>=2.11'")
            return directory, version, cuda
    raise SystemExit("fastslim is built against your torch, and found none: pip install 'torch>=2.11' first")


def find_nvcc() -> str | None:
    """The CUDA compiler, if there is one."""
    home = os.getenv("CUDA_HOME")
    candidates = (os.getenv("CUDACXX"), home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc")
    return next((path for path in candidates if path and Path(path).exists()), None)


def find_compiler() -> str:
    """The C++ compiler CMake will use, or one sentence about what to install."""
    wanted = os.getenv("CXX")
    names = [wanted.split()[0]] if wanted else ["c++", "g++", "clang++"]
    found = next((name for name in names if shutil.which(name)), None)
    if not found:
        problem = f"CXX={wanted} does not exist" if wanted else "found none"
        raise SystemExit(
            f"fastslim needs a C++17 compiler, {problem}: install g++ (apt-get install g++) or clang++, or set CXX"
        )
    return found


def check_build_tools() -> None:
    """pip's isolated environment holds them all; with --no-build-isolation they may be missing."""
    has_bdist_wheel = any(map(find_spec, ("setuptools.command.bdist_wheel", "wheel")))
    if not (has_bdist_wheel and find_spec("pybind11") and shutil.which("cmake")):
        raise SystemExit(
            "--no-build-isolation needs the build tools in this environment: "
            "pip install --upgrade setuptools cmake ninja pybind11"
        )


def replace(source: Path, target: Path) -> None:
    """Copies under a new inode: a process that has the old library loaded keeps it."""
    target.unlink(missing_ok=True)
    shutil.copy(source, target)


class CMakeBuild(build_ext):
    """Runs CMake; one build folder per compiler, torch and CUDA choice, so none sees another's cache."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        compiler = find_compiler()
        torch_dir, torch_version, torch_cuda = find_torch()
        nvcc = find_nvcc()
        wanted = os.getenv("FASTSLIM_CUDA", "auto").lower()
        if wanted not in ("0", "1", "auto"):
            raise SystemExit(f"FASTSLIM_CUDA={wanted} is not one of 0, 1, auto")
        use_cuda = {"0": False, "1": True}.get(wanted, bool(torch_cuda and nvcc))
        if use_cuda and not nvcc:
            raise SystemExit("FASTSLIM_CUDA=1 needs nvcc: put it on PATH or set CUDA_HOME")

        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        # Not build_temp: an editable install puts that into a temporary folder and starts from nothing.
        python = f"{sys.implementation.cache_tag}-{platform.machine()}"
        flavour = f"{Path(compiler).name}-torch{torch_version}{'-cuda' if use_cuda else ''}"
        build = ROOT / "build" / "cmake" / f"{python}-{flavour}"
        build.mkdir(parents=True, exist_ok=True)
        options = [
            "-DCMAKE_BUILD_TYPE=" + ("Debug" if self.debug else "Release"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTORCH_DIR={torch_dir}",
            f"-DFASTSLIM_TORCH_VERSION={torch_version}",
            f"-DFASTSLIM_CUDA={'ON' if use_cuda else 'OFF'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build / 'lib'}",
        ]
        if use_cuda:
            options.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        ninja = shutil.which("ninja")
        if ninja:  # named explicitly: the cached one of an earlier isolated build is gone
            options += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        jobs = os.getenv("MAX_JOBS", str(os.cpu_count()))
        subprocess.run(["cmake", "-S", ROOT, "-B", build, *options], check=True)
        subprocess.run(["cmake", "--build", build, "--parallel", jobs], check=True)

        # Copied, not built there: the libraries of another flavour may lie in the target already.
        target.mkdir(parents=True, exist_ok=True)
        (target / "_C_cuda.so").unlink(missing_ok=True)
        for library in (build / "lib").glob("*.so"):
            replace(library, target / library.name)

    def copy_extensions_to_source(self) -> None:
        """In-place and editable builds; setuptools knows of `_C` only."""
        super().copy_extensions_to_source()
        name = "fastslim/_C_cuda.so"
        if (Path(self.build_lib) / name).exists():
            replace(Path(self.build_lib) / name, ROOT / name)
        else:
            (ROOT / name).unlink(missing_ok=True)


if {"dist_info", "bdist_wheel", "editable_wheel", "build_ext"} & set(sys.argv):
    check_build_tools()
setup(
    packages=[*find_packages(include=["fastslim", "fastslim.*"]), "fastslim.kernels"],
    package_dir={"fastslim.kernels": "kernels"},
    ext_modules=[Extension("fastslim._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
