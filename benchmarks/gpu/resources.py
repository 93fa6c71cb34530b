"""Registers, shared memory, spills and instructions of every GPU kernel, read off the compiler: no GPU needed.

python benchmarks/gpu/resources.py        writes the table in docs/gpu-kernels.md
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("sm_80", "sm_90a")
#: Per multiprocessor: registers, threads, blocks, bytes of shared memory; and what one block may have of it.
LIMITS = {
    "sm_80": {"registers": 65536, "threads": 2048, "blocks": 32, "shared": 164 << 10, "block_shared": 163 << 10},
    "sm_90a": {"registers": 65536, "threads": 2048, "blocks": 32, "shared": 228 << 10, "block_shared": 227 << 10},
}


class Resources(NamedTuple):
    """What one compiled kernel needs.

    Attributes:
        name: of the kernel, with its template arguments or its variant.
        architecture: one of :data:`ARCHITECTURES`.
        threads: of a block.
        registers: of a thread.
        shared: bytes of a block; of CUDA C++ kernels without the dynamic part.
        local: bytes of a thread in local memory: spilled registers, arrays with run-time indices.
        wide: 16-byte accesses to global memory (LDG.128, STG.128, LDGSTS.128, bulk copies) in the code.
        tensor_core: matrix instructions in the code, such as ``"HGMMA"``; empty if there are none.
        bound: see `fastslim.kernels.variant.Variant`; empty for CUDA C++ kernels.
        failure: why it does not compile; empty if it does.
    """

    name: str
    architecture: str
    threads: int
    registers: int
    shared: int
    local: int
    wide: int
    tensor_core: str
    bound: str = ""
    failure: str = ""

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's threads that can be resident."""
        limits = LIMITS[self.architecture]
        registers = -(-self.registers // 8) * 8 * self.threads
        blocks = min(limits["registers"] // registers, limits["threads"] // self.threads, limits["blocks"])
        if self.shared:
            blocks = min(blocks, limits["shared"] // (self.shared + 1024))
        return blocks * self.threads / limits["threads"]

    def problems(self) -> list[str]:
        """What would keep the kernel from running, or from running as meant."""
        if self.failure:
            return [self.failure]
        limits = LIMITS[self.architecture]
        found = []
        if self.local:
            found.append(f"{self.local} bytes of local memory a thread")
        if self.registers * self.threads > limits["registers"]:
            found.append(f"{self.registers} registers x {self.threads} threads exceed the register file")
        if self.shared > limits["block_shared"]:
            found.append(f"{self.shared} bytes of shared memory exceed a block's {limits['block_shared']}")
        if self.bound == "matrix" and self.tensor_core != ("HGMMA" if self.architecture == "sm_90a" else "HMMA"):
            found.append(f"tensor cores are used through {self.tensor_core or 'nothing'}")
        if self.bound == "memory" and not self.wide:
            found.append("no 16-byte access to global memory")
        return found


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit; Triton carries some, too."""
    try:
        import triton

        bundled = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    except ImportError:
        bundled = Path("/nowhere")
    return str(bundled) if bundled.exists() else shutil.which(name)


def cuda_resources(stem: str, architecture: str) -> tuple[Resources, ...]:
    """All kernels of ``csrc/cuda/<stem>.cu``.

    Raises:
        RuntimeError: it does not compile.
    """
    return _cuda_resources(stem)[ARCHITECTURES.index(architecture)]


@functools.cache
def _cuda_resources(stem: str) -> tuple[tuple[Resources, ...], ...]:
    """For each architecture, compiled side by side."""
    with ThreadPoolExecutor() as pool:
        return tuple(pool.map(functools.partial(_compiled_by_nvcc, stem), ARCHITECTURES))


def _compiled_by_nvcc(stem: str, architecture: str) -> tuple[Resources, ...]:
    source = ROOT / "csrc/cuda" / f"{stem}.cu"
    flags = ["-std=c++17", "-O3", f"-arch={architecture}", "-cubin", f"-I{ROOT / 'csrc/include'}"]
    cubin = ROOT / "build/resources" / f"{_sources()}-{stem}-{architecture}.cubin"
    if not cubin.exists():
        cubin.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cubin.parent) as folder:
            run("nvcc", *flags, source, "-o", Path(folder) / "out.cubin")
            os.replace(Path(folder) / "out.cubin", cubin)
    threads = re.search(r"constexpr int kThreads = (\d+);", source.read_text())
    return _read(cubin, architecture, int(threads[1]) if threads else 256)


@functools.cache
def _sources() -> str:
    """Tells one state of the CUDA sources, and of their compiler, from another."""
    files = [path for folder in ("cuda", "include/fastslim") for path in sorted((ROOT / "csrc" / folder).iterdir())]
    content = b"".join(path.read_bytes() for path in files) + run("nvcc", "--version").encode()
    return hashlib.sha256(content).hexdigest()[:16]


def triton_resources(variant: Any, architecture: str) -> Resources:
    """One Triton program, compiled ahead of time for an architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    signature = {name: "constexpr" if name in variant.constants else variant.types[name] for name in names}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible}
    target = GPUTarget("cuda", int(re.sub(r"\D", "", architecture)), 32)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    kernel = triton.compile(
        ASTSource(variant.kernel, signature, constexprs=constants, attrs=divisible), target=target, options=options
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        (only,) = _read(cubin, architecture, variant.num_warps * 32)
    shared = max(only.shared, kernel.metadata.shared)
    return only._replace(name=f"{variant.kernel.__name__}[{variant.name}]", shared=shared, bound=variant.bound)


def triton_programs(stems: tuple[str, ...] = ()) -> list[tuple[str, Resources]]:
    """Every program of ``kernels/<stem>.py`` (of all, if none are named), with its stem, for each architecture.

    They are compiled in a process of their own: where triton was imported with its interpreter on, as in tests,
    nothing can be compiled. Triton keeps what it has compiled in ~/.triton/cache, so the next run is quick.

    Raises:
        RuntimeError: a module cannot be imported.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, __file__, "--compile", *(stems or triton_stems())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [(program.pop("stem"), Resources(**program)) for program in found]


def triton_stems() -> tuple[str, ...]:
    """The modules with Triton kernels."""
    paths = sorted((ROOT / "kernels").glob("*.py"))
    return tuple(path.stem for path in paths if re.search(r"^def variants\(", path.read_text(), re.MULTILINE))


def _compile(stems: list[str]) -> None:
    """Compiles on all cores and prints a line of JSON a program."""
    modules = {stem: importlib.import_module(f"fastslim.kernels.{stem}") for stem in stems}
    jobs = [(stem, v, a) for stem, module in modules.items() for v in module.variants() for a in ARCHITECTURES]
    _compiled.jobs = jobs  # a fork has them; kernels cannot be sent
    with multiprocessing.get_context("fork").Pool(min(os.cpu_count() or 1, 8)) as pool:
        for (stem, _, _), program in zip(jobs, pool.imap(_compiled, range(len(jobs))), strict=True):
            print(json.dumps({"stem": stem, **program._asdict()}), flush=True)


def _compiled(index: int) -> Resources:
    _, variant, architecture = _compiled.jobs[index]
    try:
        return triton_resources(variant, architecture)
    except Exception as error:  # whatever the compiler raises is this program's problem, not the others'
        name = f"{variant.kernel.__name__}[{variant.name}]"
        threads = variant.num_warps * 32
        return Resources(name, architecture, threads, 0, 0, 0, 0, "", failure=f"{type(error).__name__}: {error}")


def run(name: str, *arguments: Any) -> str:
    """What a program of the CUDA toolkit prints.

    Raises:
        RuntimeError: it is not installed, or it fails.
    """
    program = tool(name)
    if program is None:
        raise RuntimeError(f"{name} is not installed")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _read(cubin: Path, architecture: str, threads: int) -> tuple[Resources, ...]:
    """The kernels of a cubin; disassembling takes longer than compiling, so what was read is kept in build/."""
    kept = ROOT / "build/resources" / f"{hashlib.sha256(cubin.read_bytes()).hexdigest()}.txt"
    if not kept.exists():
        text = run("cuobjdump", "--dump-resource-usage", cubin)
        code = re.split(r"Function : (\S+)", run("cuobjdump", "--dump-sass", cubin))[1:]
        for name, lines in zip(code[::2], code[1::2], strict=True):
            matrix = re.search(r"\b(HGMMA|QGMMA|HMMA|DMMA)\b", lines)
            wide = len(re.findall(r"\b(?:LDG|STG|LDGSTS)\.\S*128|\bUBLKCP|\bUTMALDG|\bUTMASTG", lines))
            text += f"\nInstructions {name}: {wide} {matrix[1] if matrix else ''}"
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, kept)
    text = kept.read_text()
    instructions = {name: (int(n), matrix) for name, n, matrix in re.findall(r"Instructions (\S+): (\d+) (\w*)", text)}
    found = []
    for name, numbers in re.findall(r"Function (\S+):\s*\n\s*(.*)", text):
        number = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
        wide, matrix = instructions[name]
        found.append(
            Resources(
                name=_demangled(name),
                architecture=architecture,
                threads=threads,
                registers=number["REG"],
                shared=number["SHARED"],
                local=number["LOCAL"] + number["STACK"],
                wide=wide,
                tensor_core=matrix,
            )
        )
    return tuple(sorted(found))


def _demangled(name: str) -> str:
    """The kernel's name and template arguments, without namespaces and parameters."""
    if not name.startswith("_Z") or not shutil.which("c++filt"):
        return name
    full = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    full = full.replace("fastslim::", "").replace("(anonymous namespace)::", "").removeprefix("void ")
    full = re.sub(r"\([A-Za-z ]+\)(?=-?\d)", "", full)
    return full.split("(")[0]


def all_resources() -> Iterator[tuple[str, Resources]]:
    """Every kernel that dispatch can choose, with the file it stands in."""
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        for architecture in ARCHITECTURES:
            for kernel in cuda_resources(source.stem, architecture):
                yield f"csrc/cuda/{source.name}", kernel
    for stem, program in triton_programs():
        yield f"kernels/{stem}.py", program


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        _compile(sys.argv[2:])
    else:
        import kernel_table

        kernel_table.main()
