"""Layers that follow mutables, under MMRazor's names."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastslim.errors import FastslimRuntimeError, FastslimTypeError, FastslimValueError
from fastslim.mutators import DerivedMutable, OneShotMutableChannel, SequentialMutableChannel, SimpleMutableChannel
from fastslim.nn import (
    DynamicBatchNorm1d,
    DynamicBatchNorm2d,
    DynamicBatchNorm3d,
    DynamicChannelMixin,
    DynamicConv2d,
    DynamicLayerNorm,
    DynamicLinear,
    DynamicLinearMixin,
    DynamicMixin,
    SlimConvTranspose2d,
    SlimGroupNorm,
    SlimMultiheadAttention,
    SlimPReLU,
    SwitchableBatchNorm2d,
)
from fastslim.registry import MODELS


class OddChannels(nn.Module):
    """A mutable of somebody else, with nothing but a mask: every second channel."""

    def __init__(self, channels):
        super().__init__()
        self.current_mask = torch.arange(channels) % 2 == 1


class Masked:
    def __init__(self, mask):
        self.current_mask = mask


CASES = {
    "conv": (lambda: DynamicConv2d(8, 12, 3), "in_channels", "out_channels", (2, 8, 9, 9)),
    "reflect": (
        lambda: DynamicConv2d(8, 12, 3, padding=1, padding_mode="reflect", bias=False),
        "in_channels",
        "out_channels",
        (2, 8, 9, 9),
    ),
    "same": (lambda: DynamicConv2d(8, 12, (3, 2), padding="same"), "in_channels", "out_channels", (2, 8, 9, 9)),
    "transposed": (lambda: SlimConvTranspose2d(8, 12, 3, stride=2), "in_channels", "out_channels", (2, 8, 5, 5)),
    "linear": (lambda: DynamicLinear(8, 12), "in_features", "out_features", (5, 8)),
    "sequence": (lambda: DynamicLinear(8, 12, bias=False), "in_channels", "out_channels", (2, 3, 8)),
}


def fix(layer):
    for mutable in layer.mutable_attrs.values():
        mutable.fix_chosen(mutable.dump_chosen().chosen)


def channels_of(x):
    return 1 if x.dim() == 4 else -1


@pytest.mark.parametrize("ends", ["both", "in", "out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_layer_follows_its_mutables_and_equals_its_static_form(case, dtype, ends):
    torch.manual_seed(0)
    make, reads, makes, shape = CASES[case]
    layer, x = make().to(dtype), torch.randn(shape, dtype=dtype)
    full = layer(x)
    inputs, outputs = SequentialMutableChannel(8), SequentialMutableChannel(12)
    if ends != "out":
        layer.register_mutable_attr(reads, inputs)
    if ends != "in":
        layer.register_mutable_attr(makes, outputs)
    assert torch.equal(layer(x), full)
    for inside, outside in ((5, 7), (1, 12), (8, 1)):
        inputs.current_choice, outputs.current_choice = inside, outside
        inside, outside = inside if ends != "out" else 8, outside if ends != "in" else 12
        cut = x.narrow(channels_of(x), 0, inside)
        y = layer(cut)
        assert y.shape[channels_of(x)] == outside
    with pytest.raises(FastslimRuntimeError, match=r"is not fixed; call its fix_chosen\(\)"):
        layer.to_static_op()
    fix(layer)
    plain = layer.to_static_op()
    assert type(plain) is layer.static_op_factory and not isinstance(plain, DynamicMixin)
    assert torch.equal(plain(cut), layer(cut))
    assert set(plain.state_dict()) == set(make().state_dict()) == set(layer.state_dict())
    assert "forward" not in vars(plain)


@pytest.mark.parametrize("ends", ["both", "in", "out"])
def test_depthwise_convolution_follows_either_end(ends):
    layer = DynamicConv2d(10, 10, 3, groups=10)
    for attr in dict(both=("in_channels", "out_channels")).get(ends, (f"{ends}_channels",)):
        layer.register_mutable_attr(attr, SequentialMutableChannel(10))
        layer.get_mutable_attr(attr).current_choice = 6
    x = torch.randn(2, 6, 8, 8)
    y = layer(x)
    fix(layer)
    plain = layer.to_static_op()
    assert plain.weight.shape == (6, 1, 3, 3) and plain.groups == 6 and torch.equal(plain(x), y)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize(
    ("kind", "plain", "shape"),
    [
        (DynamicBatchNorm1d, nn.BatchNorm1d, (6, 8)),
        (DynamicBatchNorm1d, nn.BatchNorm1d, (6, 8, 5)),
        (DynamicBatchNorm2d, nn.BatchNorm2d, (6, 8, 5, 5)),
        (DynamicBatchNorm3d, nn.BatchNorm3d, (6, 8, 2, 3, 3)),
    ],
)
def test_batch_norm_equals_a_plain_one_of_its_width(kind, plain, shape, tracks, affine, training):
    layer = kind(10, affine=affine, track_running_stats=tracks)
    own = plain(8, affine=affine, track_running_stats=tracks)
    if affine or tracks:
        mutable = SequentialMutableChannel(10)
        layer.register_mutable_attr("num_features", mutable)
        mutable.current_choice = 8
        assert layer.get_mutable_attr("in_channels") is layer.get_mutable_attr("out_channels") is mutable
    else:
        with pytest.raises(FastslimRuntimeError, match="neither parameters nor statistics"):
            layer.register_mutable_attr("num_features", SequentialMutableChannel(10))
    for _ in range(3):
        x = torch.rand(shape)
        assert torch.equal(layer(x), own(x))
    layer.train(training), own.train(training)
    assert torch.equal(layer(x), own(x))
    if tracks:
        mask = layer._get_num_features_mask()
        assert torch.equal(layer.running_mean[mask], own.running_mean)
        assert torch.equal(layer.running_var[mask], own.running_var)
        assert torch.equal(layer.running_mean[~mask], torch.zeros(2))
        assert layer.num_batches_tracked == own.num_batches_tracked
    if affine or tracks:
        fix(layer)
    if affine or tracks:
        static = layer.to_static_op()
        assert type(static) is plain and torch.equal(static(x), own(x))
    with pytest.raises(ValueError, match="expects"):
        layer(torch.rand(8))


def test_layer_norm_and_group_norm_follow():
    norm, group = DynamicLayerNorm(100), SlimGroupNorm(4, 16)
    mutable, other = SequentialMutableChannel(100), SequentialMutableChannel(100)
    norm.register_mutable_attr("num_features", mutable)
    for attr in ("in_channels", "out_channels"):
        norm.register_mutable_attr(attr, other)
    mutable.current_choice = 50
    assert norm.mutable_num_features is mutable
    x = torch.randn(2, 7, 50)
    y = norm(x)
    mutable.fix_chosen()
    assert norm.to_static_op().normalized_shape == (50,) and torch.equal(norm.to_static_op()(x), y)
    groups = SequentialMutableChannel(16)
    group.register_mutable_attr("num_features", groups)
    groups.current_choice = 8
    torch.testing.assert_close(group(x := torch.randn(2, 8, 3)), nn.GroupNorm(2, 8)(x))


def test_channels_in_any_place_are_followed():
    torch.manual_seed(0)
    layer, x = DynamicConv2d(6, 10, 3), torch.randn(2, 3, 8, 8)
    layer.register_mutable_attr("in_channels", OddChannels(6))
    chosen = SimpleMutableChannel(10)
    chosen.current_choice = torch.tensor([1, 1, 0, 0, 1, 0, 0, 0, 1, 1])
    layer.register_mutable_attr("out_channels", chosen)
    weight = layer.weight[chosen.current_mask][:, 1::2]
    expected = nn.functional.conv2d(x, weight, layer.bias[chosen.current_mask])
    torch.testing.assert_close(layer(x), expected)
    chosen.fix_chosen()
    torch.testing.assert_close(layer.to_static_op()(x), expected)
    norm = DynamicBatchNorm2d(6)
    norm.register_mutable_attr("num_features", OddChannels(6))
    norm(x)
    assert (norm.running_mean[::2] == 0).all() and (norm.running_mean[1::2] != 0).all()


def test_concatenated_prefixes_are_segments():
    torch.manual_seed(0)
    parts = [SequentialMutableChannel(4), SequentialMutableChannel(6)]
    layer = DynamicLinear(20, 3)
    joined = DerivedMutable.derive_concat_mutable(parts)
    layer.register_mutable_attr("in_features", joined * 2)
    parts[0].current_choice, parts[1].current_choice = 1, 3
    x = torch.randn(2, 8)
    columns = [0, 1, 8, 9, 10, 11, 12, 13]
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight[:, columns], layer.bias))
    assert layer.segments == ((0, 2), (8, 6))


def test_an_input_of_another_width_than_chosen_is_refused():
    layer = DynamicConv2d(6, 4, 1)
    layer.register_mutable_attr("in_channels", SequentialMutableChannel(6))
    layer.mutable_in_channels.current_choice = 3
    with pytest.raises(FastslimValueError, match="take 3 channels, but the input has 4"):
        layer(torch.randn(1, 4, 2, 2))
    none = OddChannels(4)
    none.current_mask = torch.zeros(4, dtype=torch.bool)
    layer.register_mutable_attr("out_channels", none)
    with pytest.raises(FastslimValueError, match="no active channel"):
        layer(torch.randn(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("attr", "mutable", "error", "message"),
    [
        ("in_channel", SequentialMutableChannel(4), FastslimValueError, "did you mean 'in_channels'"),
        ("kernel_size", SequentialMutableChannel(4), FastslimValueError, "no 'kernel_size' that a mutable"),
        ("in_channels", object(), FastslimValueError, "needs a current_mask, .* object has none"),
        ("in_channels", Masked([True] * 4), FastslimValueError, "Masked has list"),
        ("in_channels", Masked(torch.ones(4)), FastslimTypeError, "must be a torch.nn.Module, got Masked"),
        ("in_channels", SequentialMutableChannel(10), FastslimValueError, "must have 4 entries, got 10"),
        ("out_channels", SequentialMutableChannel(4), FastslimValueError, "must have 10 entries, got 4"),
    ],
)
def test_what_is_no_mutable_of_the_layer_is_refused(attr, mutable, error, message):
    layer = DynamicConv2d(4, 10, 1)
    with pytest.raises(error, match=message):
        layer.register_mutable_attr(attr, mutable)
    assert "forward" not in vars(layer) and "mutable_attrs" not in layer._modules


@pytest.mark.parametrize("layer", [SlimPReLU(4), SlimMultiheadAttention(8, 2)])
def test_layers_that_follow_no_mutables_say_so(layer):
    with pytest.raises(FastslimValueError, match="that a mutable could choose"):
        layer.register_mutable_attr("num_features", SequentialMutableChannel(4))


def test_layers_without_mutables_run_their_class_forward():
    layer = DynamicConv2d(4, 10, 1)
    assert isinstance(layer, DynamicChannelMixin) and len(layer.mutable_attrs) == 0 and not layer._modules
    assert layer.get_mutable_attr("in_channels") is None and layer.mutable_out_channels is None
    assert "forward" not in vars(layer) and torch.equal(layer.to_static_op().weight, layer.weight)


def test_converting_keeps_the_weights():
    for plain, kind in (
        (nn.Conv2d(3, 4, 1), DynamicConv2d),
        (nn.Linear(3, 4), DynamicLinear),
        (nn.BatchNorm2d(4), DynamicBatchNorm2d),
        (nn.LayerNorm(4), DynamicLayerNorm),
    ):
        layer = kind.convert_from(plain)
        assert type(layer) is kind and all(p is layer.get_parameter(name) for name, p in plain.named_parameters())
    assert isinstance(layer, DynamicMixin) and isinstance(DynamicLinear(2, 2), DynamicLinearMixin)
    built = MODELS.build(dict(type="DynamicConv2d", in_channels=3, out_channels=4, kernel_size=1))
    assert type(built) is DynamicConv2d


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_follows_its_own_mutables(make_copy):
    layer = DynamicConv2d(8, 10, 1)
    mutable = SequentialMutableChannel(4)
    layer.register_mutable_attr("in_channels", mutable * 2)
    layer.register_mutable_attr("out_channels", SequentialMutableChannel(10))
    other = make_copy(layer)
    other.mutable_out_channels.current_choice = 3
    (source,) = other.mutable_in_channels.source_mutables
    source.current_choice = 1
    assert other(torch.randn(1, 2, 1, 1)).shape[1] == 3
    assert layer(torch.randn(1, 8, 1, 1)).shape[1] == 10 and mutable.current_choice == 4


def test_switchable_batch_norm_has_statistics_for_every_choice():
    layer, mutable = SwitchableBatchNorm2d(10), OneShotMutableChannel(10, [4, 8, 10])
    layer.init_candidates(mutable.candidate_choices)
    layer.register_mutable_attr("num_features", mutable)
    own = {width: nn.BatchNorm2d(width) for width in (4, 8, 10)}
    for width in (4, 8, 10, 8):
        mutable.current_choice = width
        x = torch.rand(3, width, 5, 5)
        assert torch.equal(layer(x), own[width](x))
    layer.eval(), own[8].eval()
    mutable.fix_chosen(8)
    static = layer.to_static_op()
    x = torch.rand(3, 8, 5, 5)
    assert type(static) is nn.BatchNorm2d and torch.equal(static(x), own[8](x)) and torch.equal(layer(x), own[8](x))
    other = SwitchableBatchNorm2d(10)
    other.register_mutable_attr("num_features", mutable)
    with pytest.raises(FastslimValueError, match="no statistics for an input"):
        other(x)
    for candidate in (0, 11, 4.0):
        with pytest.raises(FastslimValueError, match="does not fit 10 channels"):
            layer.init_candidates([candidate])
