"""batch_norm_act by Triton, on the GPU or by the interpreter: as exact as torch, and what it must not touch."""

from __future__ import annotations

import pytest
import torch
from batch_norm_act_cases import check, doubled, run, tensors
from cases import LAYOUTS

from fastslim.ops import backend, use_backend
from fastslim.ops.batch_norm_act import ACTIVATIONS, batch_norm_act, batch_norm_act_reference

pytest.importorskip("triton")
tiles = pytest.importorskip("fastslim.kernels.batch_norm_act_tiles")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter is wrong in bfloat16, and slow: tensors are small. One channel and an odd number; a multiple of 8 in
# a row that is aligned; more channels (rows) or images (planes) than a tile has.
DTYPES = [torch.float32, torch.float16] if DEVICE == "cpu" else [torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "nchw": [(5, 3, 7, 7), (3, 1, 5, 3), (2, 2, 4, 8), (130, 2, 2, 3)],
    "nhwc": [(33, 17, 2, 2), (3, 1, 5, 3), (5, 24, 7, 7), (3, 136, 3, 8)],
}
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def triton_computes_and_buffers_are_poisoned():
    """torch.empty comes filled with NaN: whatever is not written is seen."""
    torch.use_deterministic_algorithms(True)
    with use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def few_programs(monkeypatch):
    """Partial sums of several tiles each, of small tensors."""
    monkeypatch.setattr(tiles, "PROGRAMS", 6)


def on_device(arguments, dy):
    return {k: None if t is None else t.to(DEVICE) for k, t in arguments.items()}, dy.to(DEVICE)


def cases(shape, dtype, layout="nchw", **options):
    return on_device(*tensors(shape, dtype, layout, **options))


def test_triton_is_chosen_when_it_is_asked_for():
    target = backend.target_of(torch.empty(0, device=DEVICE))
    assert backend.choose("batch_norm_act", target, torch.float32).backend == "triton"
    assert backend.choose("batch_norm_act", target, torch.float64).backend != "triton"


@by_dtype
@by_layout
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_and_backward_are_as_exact_as_torch(dtype, layout, residual, activation):
    for shape in SHAPES[layout][: 4 if activation == "relu" else 1]:
        for training in (True, False):
            arguments, dy = cases(shape, dtype, layout, residual=residual)
            check(arguments, dy, shape[1], training=training, activation=activation)


@pytest.mark.parametrize("shape", [(64, 33), (2, 3), (5, 6, 11), (3, 4, 2, 5, 7)], ids=str)
def test_any_number_of_dimensions(shape):
    arguments, dy = cases(shape, torch.float32, residual=True)
    if shape != (2, 3):  # two values per channel normalise to +-1: dx is rounding noise
        check(arguments, dy, shape[1], activation="silu")
    check(arguments, dy, shape[1], activation="silu", training=False)


@by_dtype
@by_layout
def test_many_tiles_are_merged_and_repeat_bit_for_bit(dtype, layout, few_programs):
    arguments, dy = cases((2, 3, 99, 101), dtype, layout, residual=True)
    tiling = tiles.tiling_of(arguments["x"])
    assert 1 < tiling.chunks < tiling.tiles / 2
    check(arguments, dy, 3, activation="relu6")
    first, second = (run(batch_norm_act, arguments, dy, activation="relu6") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value[:3], second[name][:3]), name


@by_layout
@pytest.mark.parametrize("outlier", [False, True], ids=["level", "outlier"])
def test_large_means_do_not_hurt_the_variance(layout, outlier, few_programs):
    # A naive sum of squares in float32 is wrong by more than the variance; the second case begins with an outlier.
    arguments, dy = cases((6, 4, 31, 33), torch.float32, layout)
    arguments["x"] = arguments["x"] / 2 + 1e4
    if outlier:
        arguments["x"][0, :, 0, 0] = 0.0
    ours = run(batch_norm_act, arguments, dy)
    truth = run(batch_norm_act_reference, doubled(arguments), dy.double())
    for name in ("running_mean", "running_var", "y", "dweight"):
        active = slice(None) if name == "y" else slice(0, 4)
        value, exact = ours[name][active].double(), truth[name][active]
        assert (value - exact).abs().max() <= 1e-5 * exact.abs().max(), name


def test_parameters_in_float16():
    arguments, dy = cases((4, 9, 5, 5), torch.float16)
    for name in ("weight", "bias", "running_mean", "running_var"):
        arguments[name] = arguments[name].half()
    check(arguments, dy, 9, activation="relu")


@by_layout
def test_without_affine_and_without_running_statistics(layout):
    arguments, dy = cases((5, 6, 4, 4), torch.float32, layout)
    arguments |= {"weight": None, "bias": None, "running_mean": None, "running_var": None}
    for training in (True, False):  # batch statistics in both
        check(arguments, dy, 6, training=training, activation="relu6")


@by_layout
@pytest.mark.parametrize("segments", [None, ((0, 3), (5, 4)), ((2, 7),)], ids=["prefix", "two", "shifted"])
def test_channels_outside_are_never_read_and_never_changed(layout, segments):
    arguments, dy = cases((4, 7, 6, 5), torch.float32, layout, full=7)
    pieces = segments or ((0, 7),)
    inside = torch.cat([torch.arange(start, start + count) for start, count in pieces]).to(DEVICE)
    wide = dict(arguments)
    for name in ("weight", "bias", "running_mean", "running_var"):
        wide[name] = torch.full((12,), float("nan"), device=DEVICE)
        wide[name][inside] = arguments[name]
    narrow = run(batch_norm_act, arguments, dy, activation="relu")
    ours = run(batch_norm_act, wide, dy, activation="relu", segments=segments)
    outside = torch.ones(12, dtype=torch.bool, device=DEVICE).index_fill(0, inside, False)
    for name, expected in narrow.items():
        assert torch.equal(ours[name] if name in ("y", "dx") else ours[name][inside], expected), name
    assert ours["dweight"][outside].eq(0).all() and ours["dbias"][outside].eq(0).all()
    for name in ("running_mean", "running_var"):
        bits = ours[name].view(torch.int32), wide[name].view(torch.int32)
        assert torch.equal(bits[0][outside], bits[1][outside])
        assert not torch.equal(ours[name][inside], wide[name][inside])


def test_running_statistics_that_are_not_contiguous_are_updated():
    arguments, dy = cases((5, 6, 4, 4), torch.float32, full=6)
    expected = run(batch_norm_act, arguments, dy)
    strided = {k: torch.stack([arguments[k]] * 2, 1)[:, 0] for k in ("running_mean", "running_var")}
    assert strided["running_mean"].stride() == (2,)
    batch_norm_act(**{**arguments, **strided}, training=True, momentum=0.3, eps=1e-4)
    for name, value in strided.items():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_not_hidden_by_the_activation(activation):
    for layout in LAYOUTS:
        arguments, _ = cases((4, 3, 5, 3), torch.float32, layout, full=3)
        arguments["x"][0, 0, 0, 0] = float("nan")
        y = batch_norm_act(**arguments, training=False, activation=activation)
        assert y[0, 0, 0, 0].isnan() and y.isnan().sum() == 1


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_extreme_values_stay_finite_in_silu():
    x = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4], device=DEVICE).repeat(8, 1).requires_grad_()
    ones, zeros = torch.ones(7, device=DEVICE), torch.zeros(7, device=DEVICE)
    y = batch_norm_act(x, None, None, zeros, ones, training=False, eps=0.0, activation="silu")
    y.sum().backward()
    reference = x.detach().double().requires_grad_()
    torch.nn.functional.silu(reference).sum().backward()
    torch.testing.assert_close(y.double(), torch.nn.functional.silu(reference), rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(x.grad.double(), reference.grad, rtol=1e-6, atol=1e-30)


def test_empty_batches_and_widths():
    for shape, training in (((0, 5, 3, 3), True), ((0, 5, 3, 3), False), ((4, 0, 3, 3), False)):
        arguments, dy = cases(shape, torch.float32, full=7)
        ours = run(batch_norm_act, arguments, dy, training=training, activation="silu")
        assert ours["y"].shape == ours["dx"].shape == shape
        assert ours["dweight"].eq(0).all() and ours["dbias"].eq(0).all()
        for name in ("running_mean", "running_var"):
            assert torch.equal(torch.nan_to_num(ours[name]), torch.nan_to_num(arguments[name]))


@by_layout
def test_a_width_in_device_memory_gives_the_same_bits(layout, few_programs):
    from fastslim.kernels.batch_norm_act import launch_batch_norm_act_fwd
    from fastslim.kernels.batch_norm_act_backward import launch_batch_norm_act_bwd

    narrow, widest = {"nhwc": (40, 136), "nchw": (3, 5)}[layout]
    shape, widest = (3, narrow, 5, 16), (3, widest, 5, 16)
    arguments, dy = cases(shape, torch.float32, layout, full=widest[1], residual=True)
    options = {"training": True, "activation": 1}
    forward = {**options, "momentum": 0.3, "eps": 1e-4}

    def widened(t):  # the narrow tensor at the start of the memory of the widest
        memory = torch.full(widest, float("nan"), device=DEVICE)
        memory = memory.contiguous(memory_format=LAYOUTS[layout])
        memory.as_strided(t.shape, t.stride()).copy_(t)
        return memory

    def narrowed(t, like):
        return t.as_strided(like.shape, like.stride())

    running = {name: arguments[name].clone() for name in ("running_mean", "running_var")}
    y, stats = launch_batch_norm_act_fwd(**arguments, **forward)
    results = launch_batch_norm_act_bwd(
        dy, arguments["x"], y, stats, arguments["weight"], arguments["bias"], **options, want_residual=True,
        want_parameters=True,
    )  # fmt: skip
    width = torch.tensor([narrow], dtype=torch.int32, device=DEVICE)
    for width_multiple in {"nhwc": (1, 8), "nchw": (1,)}[layout]:
        at_width = {"width": width, "width_multiple": width_multiple}
        wide = {**arguments, **running, "x": widened(arguments["x"]), "residual": widened(arguments["residual"])}
        wide["running_mean"], wide["running_var"] = wide["running_mean"].clone(), wide["running_var"].clone()
        wide_y, wide_stats = launch_batch_norm_act_fwd(**wide, **forward, **at_width)
        wide_results = launch_batch_norm_act_bwd(
            widened(dy), wide["x"], wide_y, wide_stats, wide["weight"], wide["bias"], **options, want_residual=True,
            want_parameters=True, **at_width,
        )  # fmt: skip
        torch.testing.assert_close(narrowed(wide_y, y), y, rtol=1e-6, atol=1e-6)
        for ours, expected in zip(wide_results, results, strict=True):
            torch.testing.assert_close(narrowed(ours, expected), expected, rtol=1e-5, atol=1e-5)
        for name in running:
            torch.testing.assert_close(wide[name][:narrow], arguments[name][:narrow], rtol=1e-6, atol=1e-6)
            assert wide[name][narrow:].isnan().all()


def test_ops_keep_to_their_schema():
    arguments, dy = cases((4, 5, 3, 3), torch.float32, "nhwc", full=5, residual=True)
    forward = (*(arguments[k] for k in ("x", "weight", "bias", "running_mean", "running_var", "residual")),
               True, 0.1, 1e-5, 1, [])  # fmt: skip
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastslim.batch_norm_act_triton.default, forward, test_utils=tests)
    y, stats = torch.ops.fastslim.batch_norm_act_triton(*forward)
    backward = (dy, arguments["x"], y, stats, arguments["weight"], arguments["bias"], True, 1, True, True, [])
    torch.library.opcheck(torch.ops.fastslim.batch_norm_act_backward_triton.default, backward, test_utils=tests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 6, 5, 3).transpose(2, 3)}, "contiguous or channels_last"),
        ({"x": torch.zeros(4, 6, 5, 3, dtype=torch.float64)}, "not torch.float64"),
        ({"residual": torch.zeros(4, 6, 5, 3).contiguous(memory_format=torch.channels_last)}, "memory format"),
        ({"weight": torch.zeros(5)}, "5 channels of weight are active, x has 6"),
        ({"bias": torch.zeros(6, 1)}, "bias must be a vector"),
        ({"segments": [0, 4, 5, 2]}, "exceeds"),
        ({"segments": [0, 5]}, "5 channels of weight are active, x has 6"),
        ({"activation": 5}, "no activation 5"),
        ({"running_var": None}, "both running statistics"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_read_out_of_bounds_is_refused(change, message):
    names = ("x", "weight", "bias", "running_mean", "running_var", "residual")
    arguments = {"x": torch.zeros(4, 6, 5, 3), **{name: torch.ones(6) for name in names[1:5]}, "residual": None}
    call = {**arguments, "training": True, "momentum": 0.1, "eps": 1e-5, "activation": 1, "segments": [], **change}
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        torch.ops.fastslim.batch_norm_act_triton(*call.values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@by_layout
@pytest.mark.parametrize("shape", [(8, 64, 56, 56), (8, 2048, 7, 7), (4, 144, 56, 56), (8, 200, 14, 14)], ids=str)
def test_layers_of_real_networks(shape, layout, dtype):
    for activation, residual in (("relu", False), ("relu", True), ("silu", False), ("hardswish", True)):
        arguments, dy = cases(shape, dtype, layout, residual=residual)
        check(arguments, dy, shape[1], activation=activation)
