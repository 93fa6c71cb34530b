"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: random shapes, exact-size buffers.

`sanitizer/` holds a small driver that runs every op's kernels, without torch, against naive loops.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastslim._ext import BUILD

HERE = Path(__file__).parent / "sanitizer"
CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
# As in CMakeLists.txt: name, bytes of a vector, flags.
INSTRUCTION_SETS = {
    "baseline": (16, []),
    "avx2": (32, ["-mavx2", "-mfma", "-mf16c"]),
    "avx512": (64, AVX512),
    "avx512_bf16": (64, [*AVX512, "-mavx512bf16"]),
}
USABLE = list(INSTRUCTION_SETS)[: list(INSTRUCTION_SETS).index(str(BUILD["cpu_isa"])) + 1]
FLAGS = ["-std=c++17", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{CSRC / 'include'}"]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def _compile(output: Path, flags: list[str], source: Path) -> Path:
    # -O0: compiles in a third of the time, and nothing a sanitizer could see is optimised away.
    command = [COMPILER, "-O0", *FLAGS, *flags, "-c", str(source), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="session")
def driver(pytestconfig) -> Path:
    """Every kernel file once per instruction set, linked with the driver; kept until a source changes."""
    sources = sorted([*CSRC.glob("cpu/*"), *CSRC.glob("include/fastslim/*.h"), *HERE.iterdir(), Path(__file__)])
    content = b"".join(path.read_bytes() for path in sources)
    folder = pytestconfig.cache.mkdir("sanitizer") / hashlib.sha256(content).hexdigest()[:16]
    program = folder / "driver"
    if program.exists():
        return program
    shutil.rmtree(folder.parent)
    folder.mkdir(parents=True)
    trivial = [COMPILER, *FLAGS, "-xc++", "-", "-o", str(folder / "trivial")]
    if subprocess.run(trivial, input="int main() {}", text=True, capture_output=True).returncode != 0:
        pytest.skip(f"{COMPILER} has no sanitizer libraries: install libasan and libubsan")
    jobs = [([], path) for path in (*HERE.glob("*.cpp"), CSRC / "cpu" / "dispatch.cpp")]
    for name in INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else ["baseline"]:
        size, flags = INSTRUCTION_SETS[name]
        defines = [f"-DFASTSLIM_ISA={name}", f"-DFASTSLIM_VECTOR_BYTES={size}", *flags]
        jobs += [(defines, path) for path in CSRC.glob("cpu/*.cpp") if path.name != "dispatch.cpp"]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda i: _compile(folder / f"{i}.o", *jobs[i]), range(len(jobs))))
    subprocess.run([COMPILER, *FLAGS, *map(str, objects), "-o", str(program)], check=True)
    for path in objects:
        path.unlink()
    return program


def run(driver: Path, isa: str, lines: list[str], *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [driver, *options],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        env={**os.environ, "FASTSLIM_CPU_ISA": isa, "ASAN_OPTIONS": "detect_leaks=0"},
        timeout=120,
    )


def _line(op: str, *values: object) -> str:
    return " ".join([op, *(str(int(v)) if isinstance(v, bool) else str(v) for v in values)])


dtypes = st.sampled_from(("f32", "bf16", "f64"))
seeds = st.integers(0, 10**6)


@st.composite
def depthwise_lines(draw) -> str:
    kernel = draw(st.sampled_from(((3, 3), (3, 3), (5, 5), (7, 7), (1, 1), (2, 4), (8, 3), (3, 6))))
    stride = draw(st.sampled_from(((1, 1), (2, 2), (1, 2), (3, 2))))
    dilation = draw(st.sampled_from(((1, 1), (1, 1), (2, 1), (1, 2), (3, 2))))
    padding = [draw(st.integers(0, 5)) for _ in range(2)]
    size = [max(draw(st.integers(1, 21)), dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    channels = draw(st.one_of(st.integers(1, 40), st.sampled_from((63, 64, 65, 80))))
    multiplier = draw(st.sampled_from((1, 1, 1, 2, 3)))
    return _line(
        "depthwise_conv2d",
        draw(dtypes),
        draw(st.integers(0, 2)),
        channels,
        multiplier,
        *size,
        *kernel,
        *stride,
        *padding,
        *dilation,
        draw(st.booleans()),
        draw(st.integers(0, 3)),
        draw(seeds),
    )


@st.composite
def batch_norm_lines(draw) -> str:
    outer, channels, inner = draw(st.integers(1, 70)), draw(st.integers(1, 70)), draw(st.integers(1, 70))
    if draw(st.booleans()):
        inner = 1
    training = draw(st.booleans()) and outer * inner > 1
    activation, residual = draw(st.integers(0, 4)), draw(st.booleans())
    return _line("batch_norm_act", draw(dtypes), outer, channels, inner, activation, training, residual, draw(seeds))


@st.composite
def loss_lines(draw) -> str:
    classes = draw(st.one_of(st.integers(1, 70), st.sampled_from((1000, 1023, 1025, 2050))))
    return _line(
        "sandwich_loss",
        draw(dtypes),
        draw(st.integers(1, 9)),
        classes,
        draw(st.integers(0, 3)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from((0, 10, 100))),
        draw(st.sampled_from((5, 10, 40))),
        draw(st.sampled_from((1, 20))),
        draw(seeds),
    )


@st.composite
def conv_lines(draw) -> str:
    kernel = draw(st.sampled_from(((1, 1), (3, 3), (3, 3), (5, 5), (7, 7), (1, 3), (2, 4))))
    stride = draw(st.sampled_from(((1, 1), (2, 2), (1, 2), (3, 2), (3, 3))))
    dilation = draw(st.sampled_from(((1, 1), (1, 1), (2, 1), (1, 2), (3, 2))))
    padding = [draw(st.integers(0, 4)) for _ in range(2)]
    size = [max(draw(st.integers(1, 11)), dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    channels = st.one_of(st.integers(1, 20), st.sampled_from((24, 33, 48, 70)))
    dtype = draw(st.sampled_from(("f32", "bf16")))
    c_in, c_out = draw(channels), draw(channels)
    if c_in * c_out > 1000 and kernel[0] * kernel[1] > 9:  # naive loops without optimisation
        c_in = 3
    return _line(
        "slim_conv2d",
        dtype,
        draw(st.integers(1, 3)),
        c_in,
        c_out,
        *size,
        *kernel,
        *stride,
        *padding,
        *dilation,
        draw(st.sampled_from((0, 0, 3))),
        draw(st.sampled_from((0, 0, 5))),
        draw(st.booleans()),
        draw(seeds),
    )


LINES = {
    "depthwise_conv2d": depthwise_lines(),
    "batch_norm_act": batch_norm_lines(),
    "sandwich_loss": loss_lines(),
    "slim_conv2d": conv_lines(),
}


@pytest.mark.parametrize("op", LINES)
@pytest.mark.parametrize("isa", USABLE)
def test_kernels_stay_inside_their_buffers_and_match_naive_loops(driver, isa, op):
    @settings(
        max_examples=4,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example, HealthCheck.data_too_large],
    )
    @given(st.lists(LINES[op], min_size=30, max_size=30))
    def check(lines):
        result = run(driver, isa, lines)
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout.split() == [isa, "30"]

    check()


# What once read or wrote beyond its buffers: op, dtype, batch, c_in, c_out, image, kernel, stride, padding, dilation,
# gap, wide, channels_last, seed.
FOUND = [
    "slim_conv2d f32 1 128 8 5 5 3 3 1 1 1 1 1 1 0 16 1 1",  # pixels as far apart as the kernel's own copy of them
    "slim_conv2d bf16 1 15 8 1 85 1 80 1 1 0 0 1 1 0 0 1 1",
    "slim_conv2d bf16 1 3 8 1 405 1 400 1 1 0 0 1 1 0 0 1 1",
]


@pytest.mark.parametrize("isa", USABLE)
def test_what_was_found_stays_fixed(driver, isa):
    result = run(driver, isa, FOUND)
    assert result.returncode == 0, result.stderr[-3000:]


BROKEN = {
    "depthwise_conv2d": "depthwise_conv2d f32 1 24 1 9 9 3 3 1 1 1 1 1 1 1 0 1",
    "batch_norm_act": "batch_norm_act f32 3 24 1 1 1 0 1",
    "sandwich_loss": "sandwich_loss f32 3 3 1 1 0 0 10 1 1",  # a vector that starts inside is an "unknown-crash"
    "slim_conv2d": "slim_conv2d f32 1 24 24 9 9 3 3 1 1 1 1 1 1 0 0 1 1",
}


@pytest.mark.parametrize("op", BROKEN)
def test_an_overread_of_one_element_is_caught(driver, op):
    assert run(driver, USABLE[-1], [BROKEN[op]]).returncode == 0
    broken = run(driver, USABLE[-1], [BROKEN[op]], "--overread")
    assert broken.returncode != 0
    assert "heap-buffer-overflow" in broken.stderr
