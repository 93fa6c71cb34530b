"""Connectors: what they compute at full width, at narrow widths, and what they refuse."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastslim import errors
from fastslim.distillers import (
    BaseConnector,
    BYOTConnector,
    ConvModuleConnector,
    CRDConnector,
    FBKDStudentConnector,
    FBKDTeacherConnector,
    LinearConnector,
    MGDConnector,
    NormConnector,
    Paraphraser,
    TorchFunctionalConnector,
    TorchNNConnector,
    Translator,
)
from fastslim.registry import MODELS


def feature(channels=6, size=8, seed=0):
    torch.manual_seed(seed)
    return torch.randn(3, channels, size, size, dtype=torch.float64)


def padded(x, channels):
    """A narrow feature with zeros in the place of what is missing."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, channels - x.shape[1]))


WITH_WEIGHTS = {
    "conv": lambda: ConvModuleConnector(6, 9, norm_cfg={"type": "BN"}),
    "conv 3x3": lambda: ConvModuleConnector(6, 9, 3, padding=1, act_cfg=None),
    "torch conv": lambda: TorchNNConnector("Conv2d", {"in_channels": 6, "out_channels": 9, "kernel_size": 1}),
    "translator": lambda: Translator(6, 5),
    "mgd": lambda: MGDConnector(6, 9, lambda_mgd=0.0),
    "crd": lambda: CRDConnector(6 * 8 * 8, 4),
}


@pytest.mark.parametrize("name", WITH_WEIGHTS)
@pytest.mark.parametrize("width", [1, 4, 6])
def test_a_narrow_feature_meets_the_first_weights(name, width):
    connector, x = WITH_WEIGHTS[name]().double(), feature(width).requires_grad_()
    whole = connector(padded(x, 6))
    gradients = torch.autograd.grad(whole.square().sum(), [x, *connector.parameters()])
    narrow = connector(x)
    torch.testing.assert_close(narrow, whole)  # what is missing counts as zero
    ours = torch.autograd.grad(narrow.square().sum(), [x, *connector.parameters()])
    for gradient, expected in zip(ours, gradients, strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("width", [1, 4, 6])
def test_linear_and_norm_take_narrow_features(width):
    x = feature(width)
    linear = LinearConnector(6, 9).double()
    weight = linear.linear.weight[:, :width]
    torch.testing.assert_close(linear(x[:, :, 0, 0]), x[:, :, 0, 0] @ weight.t() + linear.linear.bias)
    for config in ({"type": "BN"}, {"type": "BN", "affine": False, "track_running_stats": False}, {"type": "IN"}):
        norm = NormConnector(6, config).double()
        dims = (2, 3) if config["type"] == "IN" else (0, 2, 3)
        mean, var = x.mean(dims, keepdim=True), x.var(dims, keepdim=True, unbiased=False)
        torch.testing.assert_close(norm(x), (x - mean) / (var + 1e-5).sqrt())


def test_a_conv_module_is_convolution_norm_and_activation():
    x, connector = feature(), ConvModuleConnector(6, 4, 3, 2, 1, norm_cfg={"type": "BN"}).double()
    plain = nn.Sequential(nn.Conv2d(6, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()).double()
    plain.load_state_dict(dict(zip(plain.state_dict(), connector.state_dict().values(), strict=True)))
    torch.testing.assert_close(connector(x), plain(x))
    assert list(connector.state_dict())[:2] == ["conv_module.conv.weight", "conv_module.bn.weight"]  # as mmcv's


def test_a_conv_module_runs_in_the_given_order():
    x = feature()
    connector = ConvModuleConnector(
        6, 4, norm_cfg={"type": "GN", "num_groups": 3}, act_cfg={"type": "LeakyReLU"}, order=("act", "norm", "conv")
    ).double()
    conv, norm = connector.conv_module.conv, connector.conv_module.norm
    expected = F.group_norm(F.leaky_relu(x), 3, norm.weight, norm.bias)
    torch.testing.assert_close(connector(x), F.conv2d(expected, conv.weight))


@pytest.mark.parametrize(("options", "has_bias"), [({}, True), ({"norm_cfg": {"type": "BN"}}, False)])
def test_a_bias_is_there_if_nothing_normalises(options, has_bias):
    assert (ConvModuleConnector(6, 4, **options).conv_module.conv.bias is not None) == has_bias
    assert ConvModuleConnector(6, 4, bias=True, **options).conv_module.conv.bias is not None
    assert ConvModuleConnector(6, 4, bias=False, **options).conv_module.conv.bias is None


def test_a_norm_may_be_frozen():
    norm = NormConnector(6, {"type": "BN", "requires_grad": False}).norm
    assert [p.requires_grad for p in norm.parameters()] == [False, False]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"order": ("conv", "norm")}, ValueError, "order should hold 'conv', 'norm' and 'act' once each"),
        ({"act_cfg": "ReLU"}, TypeError, r"act_cfg should be None or a dict such as dict\(type=...\), but got 'ReLU'"),
        ({"act_cfg": {"type": "ReLu"}}, ValueError, "act_cfg: a type 'ReLu' is not available; did you mean 'ReLU"),
        ({"norm_cfg": "BN"}, TypeError, "norm_cfg should be None or a dict"),
        ({"norm_cfg": {"type": "SyncBN"}}, ValueError, "'SyncBN' is not available.* a module of your own"),
        ({"norm_cfg": {"type": "GN"}}, ValueError, "GN needs num_groups"),
        ({"conv_cfg": "conv2d"}, TypeError, "conv_cfg should be None or a dict"),
        ({"conv_cfg": {"type": "DCN"}}, ValueError, "conv_cfg: a type 'DCN' is not available"),
        ({"conv_cfg": {"type": "Conv2d", "groups": 2}}, ValueError, "groups belong to the connector itself"),
        ({"bias": "always"}, ValueError, "bias should be True, False or 'auto'"),
        ({"with_spectral_norm": True}, ValueError, "leave it False"),
    ],
)
def test_a_wrong_config_of_a_conv_module_names_the_fix(changes, error, message):
    with pytest.raises(error, match=message) as raised:
        ConvModuleConnector(6, 4, **changes)
    assert isinstance(raised.value, errors.FastslimError)


@pytest.mark.parametrize(
    ("function", "module", "options"),
    [
        ("avg_pool2d", "AvgPool2d", {"kernel_size": 4}),
        ("max_pool2d", "MaxPool2d", {"kernel_size": 2}),
        ("adaptive_avg_pool2d", "AdaptiveAvgPool2d", {"output_size": 3}),
        ("adaptive_max_pool2d", "AdaptiveMaxPool2d", {"output_size": 3}),
        ("relu", "ReLU", {}),
        ("softmax", "Softmax", {"dim": 1}),
    ],
)
def test_torchs_functions_and_modules_are_connectors(function, module, options):
    x = feature()
    expected = getattr(F, function)(x, **options)
    assert torch.equal(TorchFunctionalConnector(function, options)(x), expected)
    assert torch.equal(TorchNNConnector(module, options).forward_train(x), expected)


@pytest.mark.parametrize(
    ("connector", "argument"), [(TorchFunctionalConnector, "function_name"), (TorchNNConnector, "module_name")]
)
def test_unknown_names_are_refused(connector, argument):
    with pytest.raises(AssertionError, match=f"{argument} cannot be None: choose one of"):
        connector()
    with pytest.raises(errors.FastslimValueError, match=f"{argument}='avgpool2d' is not available: did you mean"):
        connector("avgpool2d")


def test_factor_transfer_reconstructs_or_gives_a_factor_without_gradient():
    x, teacher = feature(), Paraphraser(6, 2).double()
    pretrained = teacher(x)
    assert pretrained.shape == x.shape and pretrained.requires_grad
    torch.testing.assert_close(pretrained, teacher.decoder(teacher.encoder(x)))
    teacher.phase = "train"
    assert not teacher(x).requires_grad
    assert torch.equal(teacher(x), teacher.encoder(x))
    convs = [m for m in [*teacher.encoder, *teacher.decoder] if hasattr(m, "weight")]
    assert [(m.in_channels, m.out_channels) for m in convs] == [(6, 6), (6, 2), (2, 2), (2, 2), (2, 6), (6, 6)]
    with pytest.raises(AssertionError, match="phase should be 'pretrain' or 'train'"):
        Paraphraser(6, 2, phase="test")


def test_an_embedding_has_length_one():
    embedding = CRDConnector(6 * 8 * 8, 5).double()(feature())
    torch.testing.assert_close(embedding.square().sum(1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("on_channel", [False, True])
def test_a_share_of_the_student_is_masked(on_channel):
    connector = MGDConnector(6, 6, lambda_mgd=0.5, mask_on_channel=on_channel).double()
    seen = []
    connector.generation[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    torch.manual_seed(0)
    connector(torch.ones(8, 6, 16, 16, dtype=torch.float64))
    kept = seen[0]
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert 0.3 < kept.mean() < 0.7
    along = (2, 3) if on_channel else (1,)
    assert torch.equal(kept, kept.amax(along, keepdim=True).expand_as(kept))
    assert connector.align is None


@pytest.mark.parametrize("width", [20, 64])
def test_an_early_feature_gets_attention_and_a_classifier(width):
    connector = BYOTConnector(16, 32, num_classes=10, expansion=4, pool_size=4, stride=2).double()
    x = feature(width)
    out, logits = connector.forward_train(x)
    assert out.shape == (3, 128)
    torch.testing.assert_close(logits, F.linear(out, connector.fc.weight, connector.fc.bias))
    gradients = torch.autograd.grad(logits.sum(), list(connector.parameters()))
    assert all(torch.isfinite(g).all() for g in gradients)
    torch.testing.assert_close(out, connector.scala(connector.attention(x)[:, :width] * x).flatten(1))


def test_an_early_feature_of_another_shape_names_the_fix():
    with pytest.raises(AssertionError, match="out_channel=48 should be in_channel=16 times a power of two"):
        BYOTConnector(16, 48, 10)
    with pytest.raises(errors.FastslimValueError, match="choose stride=2"):
        BYOTConnector(4, 8, 10).double()(feature(16))


def softly_seen(x, block, mode):
    """A non-local block, place by place."""
    g, out = (layer.conv for layer in (block.g, block.conv_out))
    values = F.conv2d(x, g.weight[:, : x.shape[1]], g.bias).flatten(2)
    keys = queries = x.flatten(2)
    if mode != "gaussian":
        theta, phi = (layer.conv for layer in (block.theta, block.phi))
        queries, keys = (F.conv2d(x, c.weight[:, : x.shape[1]], c.bias).flatten(2) for c in (theta, phi))
    seen = torch.empty_like(values)
    for n in range(len(x)):
        for place in range(values.shape[2]):
            weights = torch.stack([queries[n, :, place] @ keys[n, :, other] for other in range(keys.shape[2])])
            if mode == "dot_product":
                weights = weights / len(weights)
            else:
                scale = queries.shape[1] ** 0.5 if mode == "embedded_gaussian" else 1
                weights = (weights / scale).softmax(0)
            seen[n, :, place] = values[n] @ weights
    return x + F.conv2d(seen.view(*values.shape[:2], *x.shape[2:]), out.weight, out.bias)[:, : x.shape[1]]


@pytest.mark.parametrize("mode", ["dot_product", "embedded_gaussian", "gaussian"])
@pytest.mark.parametrize("width", [3, 6])
def test_every_place_looks_at_all_others(mode, width):
    connector = FBKDTeacherConnector(6, mode=mode, norm_cfg=None, zeros_init=False).double()
    x = feature(width, size=3)
    torch.testing.assert_close(connector(x)[3], softly_seen(x, connector.teacher_non_local, mode))


@pytest.mark.parametrize("width", [3, 6])
def test_feature_based_distillation_gives_masks_pools_and_relations(width):
    student, teacher = (c(6, sub_sample=True).double() for c in (FBKDStudentConnector, FBKDTeacherConnector))
    x = feature(width)
    spatial, channel, pooled, places, relation, adapted = student(x)
    attention = x.abs().mean(1)
    expected = (attention.flatten(1) / 0.5).softmax(1).view(3, 1, 8, 8) * 64
    torch.testing.assert_close(spatial, expected)
    torch.testing.assert_close(channel[:, :, 0, 0], (x.abs().mean((2, 3)) / 0.5).softmax(1) * width)
    assert pooled.shape == (3, 6) and places.shape == (3, 1, 8, 8)
    assert relation.shape == adapted.shape == (3, 6, 8, 8)  # at the teacher's width
    weight, bias = student.adaptation_layers.weight, student.adaptation_layers.bias
    torch.testing.assert_close(adapted, F.conv2d(x, weight[:, :width], bias))
    results = teacher(feature())
    assert len(results) == 5 and torch.equal(results[-1], feature())
    torch.testing.assert_close(results[3], feature())  # the block starts as the identity
    with pytest.raises(AssertionError, match="mode='dots_product' is not available: did you mean 'dot_product'"):
        FBKDTeacherConnector(6, mode="dots_product")


def test_a_connector_of_your_own_says_what_it_does():
    class Half(BaseConnector):
        def forward_train(self, feature):
            return feature / 2

    x = feature()
    assert torch.equal(Half()(x), x / 2)
    with pytest.raises(TypeError, match="abstract"):
        BaseConnector()


def test_connectors_are_built_by_name():
    config = {"type": "mmrazor.ConvModuleConnector", "in_channel": 3, "out_channel": 4, "act_cfg": None}
    assert isinstance(MODELS.build(config), ConvModuleConnector)
    with pytest.raises(errors.FastslimValueError, match="did you mean 'in_channel'"):
        MODELS.build(config | {"in_channels": 3})
