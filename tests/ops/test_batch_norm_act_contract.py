"""What batch_norm_act must not touch, where its gradients go, which layouts it takes and what it refuses."""

from __future__ import annotations

import pytest
import torch
from batch_norm_act_cases import doubled, run, tensors
from cases import DTYPES, LAYOUTS

from fastslim import errors
from fastslim.ops import use_backend
from fastslim.ops.batch_norm_act import ACTIVATIONS, batch_norm_act, batch_norm_act_reference
from fastslim.ops.step_buffers import StepBuffers

X = torch.zeros(4, 6, 5, 3)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def nan_poisoned_buffers():
    """torch.empty comes filled with NaN: whatever is not written is seen. One thread: tensors are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@by_dtype
@by_layout
@pytest.mark.parametrize("segments", [None, ((0, 3), (5, 4)), ((2, 7),)], ids=["prefix", "two", "shifted"])
def test_channels_outside_are_never_read_and_never_changed(dtype, layout, segments):
    arguments, dy = tensors((4, 7, 6, 5), dtype, layout, full=7)
    pieces = segments or ((0, 7),)
    inside = torch.cat([torch.arange(start, start + count) for start, count in pieces])
    wide = dict(arguments)
    for name in ("weight", "bias", "running_mean", "running_var"):
        wide[name] = torch.full((12,), float("nan"), dtype=arguments[name].dtype)
        wide[name][inside] = arguments[name]
    narrow = run(batch_norm_act, arguments, dy, activation="relu")
    ours = run(batch_norm_act, wide, dy, activation="relu", segments=segments)
    outside = torch.ones(12, dtype=torch.bool).index_fill(0, inside, False)
    for name, expected in narrow.items():
        if name in ("y", "dx"):
            assert torch.equal(ours[name], expected)
        else:
            assert torch.equal(ours[name][inside], expected), name
    assert ours["dweight"][outside].eq(0).all() and ours["dbias"][outside].eq(0).all()
    bits = torch.int64 if arguments["weight"].dtype == torch.float64 else torch.int32
    for name in ("running_mean", "running_var"):
        assert torch.equal(ours[name].view(bits)[outside], wide[name].view(bits)[outside])
        assert not torch.equal(ours[name][inside], wide[name][inside])


@by_layout
@pytest.mark.parametrize("segments", [((0, 3), (5, 4)), ((2, 7),)], ids=["two", "shifted"])
def test_segments_equal_the_reference(layout, segments):
    arguments, dy = tensors((4, 7, 6, 5), torch.float64, layout, full=12)
    for name in ("weight", "bias", "running_mean", "running_var"):
        arguments[name] = torch.linspace(0.5, 2, 12, dtype=torch.float64)
    ours = run(batch_norm_act, arguments, dy, segments=segments)
    truth = run(batch_norm_act_reference, arguments, dy, segments=segments)
    for name in ours:
        torch.testing.assert_close(ours[name], truth[name], rtol=1e-12, atol=1e-12)


def test_only_weight_or_only_bias_learns():
    for frozen in ("weight", "bias"):
        arguments, dy = tensors((5, 6, 4, 4), torch.float64, full=6)
        full = run(batch_norm_act, arguments, dy, training=False)
        leaves = {k: t.clone().requires_grad_(k in ("x", "weight", "bias") and k != frozen)
                  for k, t in arguments.items() if t is not None}  # fmt: skip
        batch_norm_act(**leaves, training=False, eps=1e-4).backward(dy)
        learning = "bias" if frozen == "weight" else "weight"
        assert leaves[frozen].grad is None
        assert torch.equal(leaves[learning].grad, full[f"d{learning}"]) and torch.equal(leaves["x"].grad, full["dx"])


@by_layout
def test_a_batch_of_none_leaves_the_statistics_alone(layout):
    for training in (True, False):
        arguments, dy = tensors((0, 6, 4, 4), torch.float32, layout, full=6)
        ours = run(batch_norm_act, arguments, dy, training=training, activation="relu")
        assert ours["y"].shape == ours["dx"].shape == (0, 6, 4, 4)
        assert ours["dweight"].eq(0).all() and ours["dbias"].eq(0).all()
        assert torch.equal(ours["running_mean"], arguments["running_mean"])
        assert torch.equal(ours["running_var"], arguments["running_var"])


def test_strided_and_mixed_layouts_give_the_same_numbers():
    arguments, dy = tensors((4, 6, 5, 3), torch.float64, residual=True, full=6)
    expected = run(batch_norm_act, arguments, dy, activation="hardswish")
    big = torch.zeros(4, 9, 5, 6, dtype=torch.float64)
    big[:, 2:8, :, ::2] = arguments["x"]
    last = arguments["residual"].contiguous(memory_format=torch.channels_last)
    for x in (big[:, 2:8, :, ::2], arguments["x"].contiguous(memory_format=torch.channels_last)):
        leaf, residual = x.detach().requires_grad_(), last.detach().requires_grad_()
        y = batch_norm_act(leaf, arguments["weight"], arguments["bias"], None, None, training=True, eps=1e-4,
                           activation="hardswish", residual=residual)  # fmt: skip
        y.backward(dy)
        for ours, name in ((y, "y"), (leaf.grad, "dx"), (residual.grad, "dresidual")):
            torch.testing.assert_close(ours, expected[name], rtol=1e-12, atol=1e-12)
    leaf = arguments["x"].requires_grad_()
    batch_norm_act(leaf, None, None, None, None, training=True).sum().backward()  # dy is expanded, stride 0
    assert leaf.grad.abs().max() < 1e-12


def test_residual_of_a_wider_dtype_promotes_as_torch_does():
    arguments, _ = tensors((4, 6, 5, 3), torch.bfloat16)
    residual = torch.randn(4, 6, 5, 3)
    y = batch_norm_act(**(arguments | {"residual": residual}), training=True)
    truth = batch_norm_act_reference(**(doubled(arguments) | {"residual": residual.double()}), training=True)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, truth.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("segments", [None, ((0, 3), (5, 4))], ids=["prefix", "segments"])
def test_gradients_go_into_the_step_buffer(segments):
    arguments, dy = tensors((4, 7, 6, 5), torch.float64)
    weight, bias = (torch.nn.Parameter(torch.linspace(0.5, 2, 12, dtype=torch.float64)) for _ in range(2))
    outside = run(batch_norm_act, arguments | {"weight": weight, "bias": bias, "running_mean": None,
                                               "running_var": None}, dy, segments=segments)  # fmt: skip
    buffers = StepBuffers([weight, bias])
    for flat in buffers.flat.values():
        flat.fill_(float("nan"))  # a stale gradient must be overwritten
    buffers.begin()
    with buffers.active():
        for _ in range(2):
            y = batch_norm_act(arguments["x"].requires_grad_(), weight, bias, None, None, training=True, eps=1e-4,
                               segments=segments)  # fmt: skip
            y.backward(dy)
            assert weight.grad is None and bias.grad is None
    buffers.finish()
    torch.testing.assert_close(weight.grad, 2 * outside["dweight"], rtol=1e-13, atol=0)
    torch.testing.assert_close(bias.grad, 2 * outside["dbias"], rtol=1e-13, atol=0)


@by_layout
def test_opcheck(layout):
    arguments, dy = tensors((4, 6, 5, 3), torch.float32, layout, full=9)
    arguments = {k: None if t is None else torch.nan_to_num(t, 1.0) for k, t in arguments.items()}
    head = arguments["x"], arguments["weight"], arguments["bias"]
    running = arguments["running_mean"], arguments["running_var"]
    for training in (True, False):
        rest = training, 0.1, 1e-5, ACTIVATIONS.index("silu"), [0, 2, 4, 4]
        torch.library.opcheck(torch.ops.fastslim.batch_norm_act.default, (*head, *running, dy, *rest))
    _, stats = torch.ops.fastslim.batch_norm_act(*head, *running, dy, *rest)
    args = dy, arguments["x"], dy, stats, *head[1:], True, ACTIVATIONS.index("silu"), True, True, [0, 2, 4, 4]
    torch.library.opcheck(torch.ops.fastslim.batch_norm_act_backward.default, args)


def test_compiles_into_one_graph():
    arguments, dy = tensors((4, 6, 5, 3), torch.float32, residual=True, full=6)
    compiled = torch.compile(batch_norm_act, fullgraph=True, backend="aot_eager")
    expected = run(batch_norm_act, arguments, dy, activation="relu")
    ours = run(compiled, arguments, dy, activation="relu")
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name])


def test_reference_backend_can_be_forced():
    arguments, dy = tensors((4, 6, 5, 3), torch.float32, full=6)
    with use_backend("reference"):
        forced = run(batch_norm_act, arguments, dy, activation="relu")
    reference = run(batch_norm_act_reference, arguments, dy, activation="relu")
    assert all(torch.equal(forced[name], reference[name]) for name in forced)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": "relu7"}, errors.FastslimValueError, "no activation 'relu7': did you mean 'relu'"),
        ({"x": X[:1, :, :1, :1]}, errors.FastslimValueError, "more than 1 value per channel.*larger batch"),
        ({"weight": torch.ones(5)}, errors.FastslimValueError, r"bias is \(9,\).*of one length"),
        ({"x": torch.zeros(4, 10, 5, 3)}, errors.FastslimValueError, "10 channels, but the layer has only 9"),
        ({"x": X.int()}, errors.FastslimTypeError, "x.float"),
        ({"x": X.double()}, errors.FastslimTypeError, "weight is torch.float32 but x is torch.float64"),
        ({"x": X[0, 0, 0]}, errors.FastslimValueError, r"x must be \(N, C, ...\), got \(3,\)"),
        ({"residual": X[:, :5]}, errors.FastslimValueError, "one channel unit"),
        ({"running_var": None}, errors.FastslimValueError, "both running_mean and running_var"),
        ({"segments": ((0, 4), (6, 4))}, errors.FastslimValueError, "segments"),
        ({"segments": ((0, 4),)}, errors.FastslimValueError, "take 4 channels, but the input has 6"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(change, error, message):
    vectors = {k: torch.ones(9) for k in ("weight", "bias", "running_mean", "running_var")}
    with pytest.raises(error, match=message):
        batch_norm_act(**({"x": X, "training": True} | vectors | change))


def test_the_raw_op_refuses_to_read_out_of_bounds():
    op, vector = torch.ops.fastslim.batch_norm_act, torch.ones(6)
    rest = True, 0.1, 1e-5, 1
    for args, message in [
        ((X, vector, None, None, None, None, *rest, [2, 6]), "exceeds"),
        ((X, vector, None, None, None, None, *rest, [-1, 6]), "exceeds"),
        ((X, vector, None, None, None, None, *rest, [0, 5]), "segments hold 5 channels"),
        ((X, vector[:5], None, None, None, None, *rest, []), "exceeds"),
        ((X, vector, None, vector, vector[:3], None, *rest, []), "running_var"),
        ((X[:, :, ::2], vector, None, None, None, None, *rest, []), "contiguous"),
        ((X, vector, None, None, None, X[:2], *rest, []), "residual must have x's shape"),
        ((X, vector, None, None, None, X.double(), *rest, []), "residual must have"),
        ((X, vector, None, None, None, None, True, 0.1, 1e-5, 9, []), "no activation"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            op(*args)
    backward, stats = torch.ops.fastslim.batch_norm_act_backward, torch.zeros(2, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="stats"):
        backward(X, X, None, stats[:, :5], vector, None, True, 1, False, True, [])
    with pytest.raises(RuntimeError, match="needs y or the residual"):
        backward(X, X, None, stats, vector, None, True, 1, True, True, [])
