"""The C++ kernels of `slim_conv2d` by themselves, against float64, with NaN wherever nothing may be read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import assert_as_exact_as_torch
from torch import Tensor

from fastslim._ext import BUILD
from fastslim.ops import slim_conv2d, use_backend

OPS = torch.ops.fastslim
needs_amx = pytest.mark.skipif(not BUILD["slim_conv2d_bf16"], reason="the bfloat16 kernel needs AMX")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_amx)]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

# batch, c_in, c_out, size, kernel, stride, padding, dilation, segments
CASES = {
    "1x1": (2, 24, 40, (9, 7), (1, 1), (1, 1), (0, 0), (1, 1), None),
    "1x1-stride2": (3, 40, 24, (9, 8), (1, 1), (2, 2), (0, 0), (1, 1), None),
    "1x1-padded-stride3": (2, 5, 17, (7, 8), (1, 1), (3, 3), (2, 1), (1, 1), None),
    "1x1-power-of-two": (2, 128, 128, (6, 6), (1, 1), (1, 1), (0, 0), (1, 1), None),
    "3x3": (2, 56, 88, (14, 13), (3, 3), (1, 1), (1, 1), (1, 1), None),
    "3x3-no-padding": (2, 8, 104, (9, 6), (3, 3), (1, 1), (0, 0), (1, 1), None),
    "3x3-stride2": (3, 17, 48, (15, 14), (3, 3), (2, 2), (1, 1), (1, 1), None),
    "3x3-stride3-dilated": (2, 24, 9, (13, 17), (3, 3), (3, 3), (2, 0), (2, 1), None),
    "3x3-stride2-dilated2": (2, 12, 20, (11, 12), (3, 3), (2, 2), (2, 2), (2, 2), None),
    "3x3-segments": (2, 21, 33, (8, 9), (3, 3), (1, 1), (1, 1), (1, 1), ((0, 5), (9, 0), (16, 16))),
    "3x3-one-channel": (2, 1, 1, (6, 5), (3, 3), (1, 1), (1, 1), (1, 1), None),
    "3x3-one-pixel": (4, 8, 6, (1, 1), (3, 3), (1, 1), (1, 1), (1, 1), None),
    "3x3-many-weights": (2, 260, 270, (5, 4), (3, 3), (1, 1), (1, 1), (1, 1), None),
    "3x3-many-weights-stride2": (2, 200, 200, (7, 8), (3, 3), (2, 2), (1, 1), (1, 1), ((2, 150), (160, 50))),
    "3x3-many-pixels": (5, 16, 24, (33, 31), (3, 3), (1, 1), (1, 1), (1, 1), None),
    "5x5-much-padding": (2, 6, 16, (3, 4), (5, 5), (1, 1), (4, 3), (1, 1), None),
    "7x7-stem": (4, 3, 40, (55, 49), (7, 7), (2, 2), (3, 3), (1, 1), None),
    "1x3": (2, 13, 26, (5, 9), (1, 3), (1, 2), (0, 1), (1, 1), None),
    "4x2": (2, 9, 12, (9, 9), (4, 2), (2, 1), (1, 0), (1, 3), None),
}


class Case:
    """Operands amid NaN: a weight in a wider one, an input that is a prefix of wider pixels."""

    def __init__(self, name: str, dtype: torch.dtype, layout: str, batch: int | None = None, wide: int = 3) -> None:
        n, c_in, c_out, size, kernel, *self.geometry, segments = CASES[name]
        torch.manual_seed(0)
        nan, self.c_out, self.dtype = float("nan"), c_out, dtype
        segments = ((0, c_in),) if segments is None else segments
        self.segments = [] if CASES[name][-1] is None else [number for pair in segments for number in pair]
        self.channels = torch.cat([torch.arange(first, first + count) for first, count in segments])
        pixels = torch.full((n if batch is None else batch, c_in + wide, *size), nan, dtype=dtype)
        self.x = pixels.to(memory_format=torch.channels_last)[:, :c_in]
        self.x.copy_(torch.randn(self.x.shape))
        full = (c_out + 2, int(self.channels.max()) + 4, *kernel)
        self.weight = torch.full(full, nan).to(memory_format=LAYOUTS[layout])
        self.weight[:c_out, self.channels] = torch.randn(c_out, c_in, *kernel)
        self.bias = torch.randn(c_out + 2)
        self.bias[c_out:] = nan
        self.conv = (*self.geometry, c_out, self.segments)
        self.grad = torch.randn(self.torch(dtype)[0].shape).to(dtype).to(memory_format=torch.channels_last)

    def torch(self, dtype: torch.dtype, backward: bool = False) -> list[Tensor]:
        """Output, and the gradients of input and active weight, by torch."""
        x = self.x.to(dtype, copy=True).requires_grad_()
        # Kernels round the weight to the images' dtype, too.
        active = self.weight[: self.c_out][:, self.channels].to(self.dtype).to(dtype).requires_grad_()
        y = F.conv2d(x, active, self.bias[: self.c_out].to(dtype), *self.geometry)
        return [y.detach(), *(torch.autograd.grad(y, (x, active), self.grad.to(dtype)) if backward else ())]

    def gradient(self, value: float) -> tuple[Tensor, Tensor]:
        """A full-size gradient of equal elements, and which of them are outside the region."""
        outside = torch.ones_like(self.weight, dtype=torch.bool)
        outside[: self.c_out, self.channels] = False
        return torch.full_like(self.weight, value), outside


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_direction_is_as_exact_as_torch_and_reads_nothing_inactive(name, dtype, layout) -> None:
    case = Case(name, dtype, layout)
    (y, gx, gw), (y_true, gx_true, gw_true) = case.torch(dtype, True), case.torch(torch.float64, True)
    ours = OPS.slim_conv2d_cpp(case.x, case.weight, case.bias, *case.conv)
    assert_as_exact_as_torch(ours, y, y_true)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    ours = OPS.slim_conv2d_backward_input_cpp(case.grad, case.weight, case.x.shape, *case.conv)
    assert_as_exact_as_torch(ours, gx, gx_true)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    for add, before in ((False, float("nan")), (True, 2.0)):
        full, outside = case.gradient(before)
        OPS.slim_conv2d_backward_weight_cpp(case.grad, case.x, full, *case.conv, add)
        region = full[: case.c_out][:, case.channels]
        base = 2.0 if add else 0.0
        assert_as_exact_as_torch(region, gw.float() + base, gw_true + base)
        assert torch.equal(full[outside].nan_to_num(7), torch.full_like(full, before)[outside].nan_to_num(7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["3x3-stride2", "1x1", "7x7-stem"])
def test_operands_in_other_layouts_are_copied(name, dtype) -> None:
    case = Case(name, dtype, "nhwc", wide=0)
    y = OPS.slim_conv2d_cpp(case.x, case.weight, case.bias, *case.conv)
    assert torch.equal(OPS.slim_conv2d_cpp(case.x.contiguous(), case.weight, case.bias, *case.conv), y)
    expanded = torch.ones((), dtype=dtype).expand_as(case.grad)
    results = []
    for grad, x in ((expanded, case.x.contiguous()), (torch.ones_like(case.grad), case.x)):
        full, _ = case.gradient(0.0)
        gx = OPS.slim_conv2d_backward_input_cpp(grad, case.weight, x.shape, *case.conv)
        OPS.slim_conv2d_backward_weight_cpp(grad, x, full, *case.conv, False)
        results.append((gx, full))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_batch_gives_empty_images_and_a_zero_gradient(dtype) -> None:
    case = Case("3x3-segments", dtype, "nhwc", batch=0)
    y = OPS.slim_conv2d_cpp(case.x, case.weight, case.bias, *case.conv)
    assert y.shape == (0, case.c_out, 8, 9)
    assert OPS.slim_conv2d_backward_input_cpp(case.grad, case.weight, case.x.shape, *case.conv).shape == case.x.shape
    for add in (False, True):
        full, outside = case.gradient(5.0)
        OPS.slim_conv2d_backward_weight_cpp(case.grad, case.x, full, *case.conv, add)
        assert (full[outside] == 5).all()
        assert (full[~outside] == (5 if add else 0)).all()


_DIGEST = """
import hashlib, sys, torch
sys.path.insert(0, sys.argv[1])
from test_slim_conv2d_cpp import CASES, OPS, Case
torch.set_num_threads(int(sys.argv[2]))
for name in CASES:
    for dtype in (torch.float32, torch.bfloat16)[: int(sys.argv[3])]:
        case = Case(name, dtype, "nhwc")
        full, _ = case.gradient(0.0)
        y = OPS.slim_conv2d_cpp(case.x, case.weight, None, *case.conv)
        gx = OPS.slim_conv2d_backward_input_cpp(case.grad, case.weight, case.x.shape, *case.conv)
        OPS.slim_conv2d_backward_weight_cpp(case.grad, case.x, full, *case.conv, False)
        digest = hashlib.sha256(b"".join(t.float().contiguous().numpy().tobytes() for t in (y, gx, full)))
        print(name, dtype, digest.hexdigest())
"""


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    def digests(threads: int) -> str:
        arguments = [str(Path(__file__).parent), str(threads), "2" if BUILD["slim_conv2d_bf16"] else "1"]
        env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        run = [sys.executable, "-c", _DIGEST, *arguments]
        return subprocess.run(run, capture_output=True, text=True, check=True, env=env).stdout

    one = digests(1)
    assert len(one.splitlines()) >= len(CASES)
    assert digests(3) == one


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_older_instruction_sets_compute_the_same(isa) -> None:
    known = ["baseline", "avx2", "avx512", "avx512_bf16"]
    if known.index(isa) > known.index(str(BUILD["cpu_isa"])):
        pytest.skip(f"this processor has no {isa}")
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_slim_conv2d_cpp import CASES, test_every_direction_is_as_exact_as_torch_and_reads_nothing_inactive as check
for name in CASES:
    check(name, torch.float32, "nhwc")
"""
    env = {**os.environ, "FASTSLIM_CPU_ISA": isa}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_backend_cpp_trains_through_autograd_as_the_library_does() -> None:
    case = Case("3x3-segments", torch.float32, "nhwc", wide=0)
    stride, padding, dilation = case.geometry
    segments = tuple(zip(case.segments[::2], case.segments[1::2], strict=True))
    settings = dict(stride=stride, padding=padding, dilation=dilation, c_out=case.c_out, segments=segments)
    results = []
    for forced in ("cpp", "library"):
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (case.x, case.weight)]
        with use_backend(forced):
            y = slim_conv2d(*leaves, **settings)
            results.append((y, *torch.autograd.grad(y, leaves, case.grad)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["3x3-stride2", "1x1"])
def test_ops_are_declared_as_they_behave(name) -> None:
    case = Case(name, torch.float32, "nhwc", wide=0)
    weight, (full, _) = case.weight.nan_to_num(0), case.gradient(0.0)
    torch.library.opcheck(OPS.slim_conv2d_cpp.default, (case.x, weight, case.bias, *case.conv))
    size = list(case.x.shape)
    torch.library.opcheck(OPS.slim_conv2d_backward_input_cpp.default, (case.grad, weight, size, *case.conv))
    torch.library.opcheck(OPS.slim_conv2d_backward_weight_cpp.default, (case.grad, case.x, full, *case.conv, True))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (dict(weight=torch.randn(8, 8, 3, 3, dtype=torch.float64)), "weight must be float32"),
        (dict(x=torch.randn(1, 4, 5, 5, dtype=torch.float64)), "images must be float32 or bfloat16"),
        (dict(c_out=9), "at most the layer's 8 channels"),
        (dict(segments=[0, 3]), "do not add up"),
        (dict(segments=[6, 4]), "beyond the weight"),
        (dict(x=torch.randn(1, 4, 2, 2), padding=[0, 0]), "larger than the padded input"),
        (dict(bias=torch.randn(3)), "bias must be float32"),
        (dict(stride=[0, 1]), "bad stride"),
    ],
    # Tensors have no name that is the same in every process.
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_would_be_read_out_of_bounds_is_refused(change, problem) -> None:
    call = dict(
        x=torch.randn(1, 4, 5, 5), weight=torch.randn(8, 8, 3, 3), bias=None,
        stride=[1, 1], padding=[1, 1], dilation=[1, 1], c_out=8, segments=[],
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=problem):
        OPS.slim_conv2d_cpp(*{**call, **change}.values())
