"""What slim layers promise besides numbers: clear refusals, settings honoured, nothing global changed, compilation."""

from __future__ import annotations

import pytest
import torch
from layer_cases import CASES, randomised
from torch import nn
from torch.nn.utils import parametrizations, prune

from fastslim import errors
from fastslim.nn import (
    SLIM_CLASSES,
    SlimBatchNorm1d,
    SlimBatchNorm2d,
    SlimBatchNorm3d,
    SlimConv1d,
    SlimConv2d,
    SlimConv3d,
    SlimConvTranspose1d,
    SlimConvTranspose2d,
    SlimEmbedding,
    SlimGroupNorm,
    SlimInstanceNorm2d,
    SlimLayerNorm,
    SlimLinear,
    SlimMultiheadAttention,
    SlimPReLU,
    SlimRMSNorm,
    SwitchableBatchNorm2d,
)

TIGHT = dict(rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plain_class", SLIM_CLASSES, ids=lambda c: c.__name__)
def test_subclasses_and_own_forwards_are_refused(plain_class) -> None:
    args = {nn.MultiheadAttention: (8, 2), nn.GroupNorm: (2, 8), nn.Linear: (8, 8), nn.Embedding: (8, 8), nn.PReLU: ()}
    sizes = args.get(plain_class, (8, 8, 3) if issubclass(plain_class, nn.modules.conv._ConvNd) else (8,))
    own = type("Own", (plain_class,), {})(*sizes)
    with pytest.raises(errors.FastslimTypeError, match="its own forward would be lost"):
        SLIM_CLASSES[plain_class].from_torch(own)
    patched = plain_class(*sizes)
    patched.forward = lambda x: x
    with pytest.raises(errors.FastslimTypeError, match="its own forward would be lost"):
        SLIM_CLASSES[plain_class].from_torch(patched)


def test_weights_made_by_hooks_are_refused() -> None:
    pruned = nn.Linear(4, 4)
    prune.random_unstructured(pruned, "weight", 0.5)
    with pytest.raises(errors.FastslimTypeError, match=r"weight of this Linear is made by a hook .* prune.remove"):
        SlimLinear.from_torch(pruned)
    with pytest.raises(errors.FastslimTypeError, match="remove parametrizations"):
        SlimConv1d.from_torch(parametrizations.weight_norm(nn.Conv1d(4, 4, 3)))


def test_max_norm_is_refused() -> None:
    with pytest.raises(errors.FastslimValueError, match="max_norm=1.0 rescales whole vectors"):
        SlimEmbedding.from_torch(nn.Embedding(5, 8, max_norm=1.0))
    with pytest.raises(errors.FastslimValueError, match="max_norm=1.0 rescales whole vectors"):
        SlimEmbedding(5, 8, max_norm=1.0)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (SlimConv1d(4, 4, 3), (2, 6, 9)),
        (SlimConv2d(4, 4, 3), (2, 6, 9, 9)),
        (SlimConv3d(4, 4, 3), (2, 6, 9, 9, 9)),
        (SlimConvTranspose1d(4, 4, 3), (2, 6, 9)),
        (SlimLinear(4, 4), (2, 6)),
        (SlimBatchNorm1d(4), (2, 6)),
        (SlimBatchNorm3d(4), (2, 6, 3, 3, 3)),
        (SlimLayerNorm(4), (2, 6)),
        (SlimLayerNorm((4, 3)), (2, 6, 3)),
        (SlimRMSNorm(4), (2, 6)),
        (SlimGroupNorm(2, 4), (2, 6)),
        (SlimInstanceNorm2d(4), (2, 6, 5, 5)),
        (SlimPReLU(4), (2, 6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "x".join(map(str, value)),
)
def test_an_input_wider_than_the_layer_is_refused_in_words(layer, shape) -> None:
    with pytest.raises(errors.FastslimValueError, match="the input has 6 channels, but the layer has only 4"):
        layer(torch.randn(shape))
    layer.segments = ((0, 1), (3, 1))
    narrow = next(i for i, n in enumerate(shape) if i and n == 6)
    with pytest.raises(errors.FastslimValueError, match="take 2 channels, but the input has 3"):
        layer(torch.randn(*shape[:narrow], 3, *shape[narrow + 1 :]))


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (SlimConv1d(4, 4, 3), (2, 4, 9, 9), r"\(N, C, H\) or \(C, H\)"),
        (SlimConv3d(4, 4, 3), (2, 4), r"\(N, C, D, H, W\) or \(C, D, H, W\)"),
        (SlimBatchNorm1d(4), (2, 4, 3, 3), r"\(N, C\) or \(N, C, L\)"),
        (SlimLayerNorm((4, 3)), (2, 4, 5), r"normalises over \(4, 3\)"),
        (SlimLayerNorm((4, 3)), (3,), r"normalises over \(4, 3\)"),
        (SlimGroupNorm(2, 4), (4,), r"expects \(N, C, ...\)"),
        (SlimGroupNorm(2, 4), (2, 3, 5), "whole groups of 2 channels"),
        (SlimInstanceNorm2d(4), (4, 4), "expects 3 or 4 dimensions"),
    ],
)
def test_an_input_of_the_wrong_form_is_refused_in_words(layer, shape, message) -> None:
    with pytest.raises(errors.FastslimValueError, match=message):
        layer(torch.randn(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(out_segments=((0, 4), (3, 2))), "in order, apart, and inside"),
        (dict(out_segments=((0, 4), (14, 4))), "in order, apart, and inside the layer's 16"),
        (dict(out=5, out_segments=((0, 4),)), "hold 4 channels, but out=5"),
        (dict(out_segments=()), "out=0"),
        (dict(out=17), "choose 1 to 16"),
    ],
)
def test_output_segments_must_fit_the_layer(change, message) -> None:
    layer = SlimLinear(8, 16)
    with pytest.raises(errors.FastslimValueError, match=message):
        layer.set_width(**change)
    assert (layer.active_out, layer.segments, layer.out_segments) == (16, None, None)


def test_output_segments_that_are_a_prefix_keep_the_fast_way() -> None:
    layer = SlimLinear(8, 16)
    layer.set_width(out_segments=[[0, 3], [3, 2]])
    assert (layer.active_out, layer.out_segments) == (5, None)
    layer.set_width(out_segments=((2, 3),))
    layer.set_width()
    assert (layer.active_out, layer.out_segments) == (16, None)


def test_width_may_be_written_straight_into_the_layer() -> None:
    """As the mutator does, hundreds of times a second."""
    layer = SlimConv1d(8, 16, 3)
    layer.__dict__.update(active_out=4, segments=((0, 4),), out_segments=((0, 4),))
    expected = nn.functional.conv1d(x := torch.randn(1, 4, 9), layer.weight[:4, :4], layer.bias[:4])
    torch.testing.assert_close(layer(x), expected)


def test_group_norm_keeps_whole_groups() -> None:
    with pytest.raises(errors.FastslimValueError, match="whole groups of 2 channels"):
        SlimGroupNorm(4, 8).set_width(out=3)
    cut = SlimGroupNorm(4, 8)
    cut.set_width(out=4, segments=((0, 1), (3, 3)))
    with pytest.raises(errors.FastslimValueError, match="cut one"):
        cut(torch.randn(2, 4))
    SlimGroupNorm(1, 8).set_width(out=3)


def test_grouped_convolution_refuses_inputs_and_outputs_of_different_groups() -> None:
    for layer in (SlimConv1d(8, 16, 3, groups=4), SlimConvTranspose1d(8, 16, 3, groups=4)):
        layer.set_width(segments=((0, 2), (4, 2)), out_segments=((0, 4), (12, 4)))
        with pytest.raises(errors.FastslimValueError, match="not those of the same groups"):
            layer(torch.randn(1, 4, 9))
        layer.set_width(out=4)
        with pytest.raises(errors.FastslimValueError, match="2 of 4 groups are active and give 8 output channels"):
            layer(torch.randn(1, 4, 9))
        layer.set_width()
        with pytest.raises(errors.FastslimValueError, match="whole groups of 2 input channels"):
            layer(torch.randn(1, 3, 9))


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(padding="same"),
        dict(padding="valid"),
        dict(padding=2, padding_mode="circular"),
        dict(padding="same", padding_mode="reflect", kernel_size=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_padding_is_torchs(dims, kwargs) -> None:
    if dims == 3 and kwargs.get("padding_mode") == "reflect":
        kwargs = {**kwargs, "padding_mode": "replicate"}
    plain_class = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    torch.manual_seed(0)
    slim = SLIM_CLASSES[plain_class](6, 8, **{"kernel_size": 3, **kwargs}).double()
    x = torch.randn(2, 4, *(7, 6, 5)[:dims], dtype=torch.float64)
    for out_segments in (None, ((0, 2), (5, 3))):
        slim.set_width(out=5, out_segments=out_segments)
        plain = slim.to_torch(4)
        torch.testing.assert_close(slim(x), plain(x), **TIGHT)


def test_transposed_convolution_honours_output_size() -> None:
    slim = SlimConvTranspose2d(6, 8, 3, stride=2)
    slim.set_width(out=5)
    x = torch.randn(2, 4, 5, 5)
    for size in ([11, 12], [2, 5, 12, 11]):
        assert slim(x, output_size=size).shape[2:] == tuple(size[-2:])
        torch.testing.assert_close(slim(x, size), slim.to_torch(4)(x, size))


@pytest.mark.parametrize("segments", [None, ((0, 1), (4, 2))])
@pytest.mark.parametrize(
    ("cls", "rest"), [(SlimBatchNorm1d, ()), (SlimBatchNorm2d, (2, 2)), (SlimBatchNorm3d, (2, 2, 2))]
)
def test_calibrated_statistics_serve_evaluation_and_the_plain_form(cls, rest, segments) -> None:
    norm = randomised(cls(8)).eval()
    norm.set_width(out=3, segments=segments)
    x = torch.randn(5, 3, *rest)
    uncalibrated = norm(x)
    norm.calibrated = (torch.randn(3), torch.rand(3) + 0.5)
    plain = norm.to_torch()
    assert torch.equal(plain.running_mean, norm.calibrated[0])
    assert "calibrated" not in plain.__dict__
    torch.testing.assert_close(norm(x), plain(x))
    assert not torch.allclose(norm(x), uncalibrated)


def test_plain_form_of_a_switchable_norm_has_the_set_of_its_width() -> None:
    norm = SwitchableBatchNorm2d(8, candidates=[4])
    randomised(norm)
    x = torch.randn(2, 4, 3, 3)
    norm.set_width(out=4)
    plain = norm.eval().to_torch()
    assert type(plain) is nn.BatchNorm2d
    torch.testing.assert_close(plain(x), norm(x))
    assert not [*plain.children()]
    assert torch.equal(norm.to_torch(8).weight, norm.weight)


def test_plain_form_draws_no_random_numbers() -> None:
    layers = [case.slim() for case in CASES.values()]
    attention = SlimMultiheadAttention(16, 4)
    attention.set_width(out=16, heads=2)
    before = torch.get_rng_state()
    for case, layer in zip(CASES.values(), layers, strict=True):
        layer.to_torch(case.channels)
    attention.to_torch()
    assert torch.equal(torch.get_rng_state(), before)


def test_plain_form_refuses_inputs_the_layer_does_not_have() -> None:
    with pytest.raises(errors.FastslimValueError, match="the input has 9 channels, but the layer has only 8"):
        SlimLinear(8, 4).to_torch(9)
    narrow = SlimLinear(8, 4)
    narrow.set_width(segments=((0, 2), (4, 2)))
    with pytest.raises(errors.FastslimValueError, match="take 4 channels, but the input has 3"):
        narrow.to_torch(3)


def test_autocast_computes_narrow_layers_in_low_precision() -> None:
    linear = SlimLinear(8, 16)
    linear.set_width(out_segments=((0, 2), (8, 2)))
    conv = SlimConv1d(8, 4, 3)
    attention = SlimMultiheadAttention(8, 4, batch_first=True)
    attention.set_width(out=4, heads=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(2, 6)).dtype == torch.bfloat16
        assert conv(torch.randn(2, 6, 9)).dtype == torch.bfloat16
        x = torch.randn(2, 3, 6)
        assert attention(x, x, x)[0].dtype == torch.bfloat16


class Mixed(nn.Module):
    """One of most kinds, in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = SlimEmbedding(10, 8)
        self.attention = SlimMultiheadAttention(8, 4, batch_first=True)
        self.norm = SlimLayerNorm(8)
        self.conv = SlimConv1d(8, 8, 3, padding=1)
        self.up = SlimConvTranspose1d(8, 8, 2, stride=2)
        self.groups, self.act = SlimGroupNorm(4, 8), SlimPReLU(8)
        self.head = SlimLinear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.act(self.groups(self.up(self.conv(x.transpose(1, 2)))))
        return self.head(x.mean(2))


def test_compiled_layers_follow_the_width() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = Mixed().double(), torch.randint(0, 10, (2, 6))
    compiled = torch.compile(model, backend="aot_eager")
    for width in (8, 4, 8):
        for layer in (model.embedding, model.attention, model.conv, model.up):
            layer.set_width(out=width)
        results = []
        for run in (model, compiled):
            model.zero_grad()
            y = run(x)
            y.square().sum().backward()
            results.append([y, *(p.grad.clone() for p in model.parameters())])
        for eager, fast in zip(*results, strict=True):
            torch.testing.assert_close(fast, eager, rtol=1e-9, atol=1e-9)
