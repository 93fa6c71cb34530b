"""The networks: torchvision's state_dict keys and shapes, published sizes, small images, option checks."""

from __future__ import annotations

import re

import pytest
import torch

from fastslim.errors import FastslimValueError
from fastslim.models import MODEL_BUILDERS, create_model

# Published parameter counts and multiply-adds at 224 px, in millions: torchvision's tables of models (0.31 GFLOPS of
# mnasnet1_0), and for MobileNetV1 Howard et al. (2017), table 8: 4.2 M parameters, 569 M multiply-adds.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "mobilenet_v1": 4_231_976,
    "mobilenet_v2": 3_504_872,
    "mnasnet": 4_383_312,
}
MULTIPLY_ADDS = {"resnet18": 1814, "resnet50": 4089, "mobilenet_v1": 569, "mobilenet_v2": 301, "mnasnet": 315}
BN_KEYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def bn_shapes(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{key}": () if key == "num_batches_tracked" else (channels,) for key in BN_KEYS}


def resnet_shapes(bottleneck: bool, depths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes as torchvision's published ResNet checkpoints hold them, spelt out from the naming rule."""
    shapes = {"conv1.weight": (64, 3, 7, 7), **bn_shapes("bn1", 64)}
    c_in = 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        c_out = width * (4 if bottleneck else 1)
        for block in range(depth):
            prefix = f"layer{stage + 1}.{block}"
            kernels = [(width, c_in, 1, 1), (width, width, 3, 3), (c_out, width, 1, 1)]
            if not bottleneck:
                kernels = [(width, c_in, 3, 3), (width, width, 3, 3)]
            for index, kernel in enumerate(kernels, start=1):
                shapes[f"{prefix}.conv{index}.weight"] = kernel
                shapes |= bn_shapes(f"{prefix}.bn{index}", kernel[0])
            if block == 0 and c_in != c_out:
                shapes[f"{prefix}.downsample.0.weight"] = (c_out, c_in, 1, 1)
                shapes |= bn_shapes(f"{prefix}.downsample.1", c_out)
            c_in = c_out
    return shapes | {"fc.weight": (1000, c_in), "fc.bias": (1000,)}


def mobilenet_v2_shapes() -> dict[str, tuple[int, ...]]:
    """Keys and shapes as torchvision's published MobileNetV2 checkpoint holds them."""
    outputs = [16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320]
    shapes = {"features.0.0.weight": (32, 3, 3, 3), **bn_shapes("features.0.1", 32)}
    c_in = 32
    for index, c_out in enumerate(outputs, start=1):
        prefix, hidden, at = f"features.{index}.conv", c_in * (1 if index == 1 else 6), 0
        if index > 1:
            shapes |= {f"{prefix}.0.0.weight": (hidden, c_in, 1, 1), **bn_shapes(f"{prefix}.0.1", hidden)}
            at = 1
        shapes |= {f"{prefix}.{at}.0.weight": (hidden, 1, 3, 3), **bn_shapes(f"{prefix}.{at}.1", hidden)}
        shapes |= {f"{prefix}.{at + 1}.weight": (c_out, hidden, 1, 1), **bn_shapes(f"{prefix}.{at + 2}", c_out)}
        c_in = c_out
    shapes |= {"features.18.0.weight": (1280, 320, 1, 1), **bn_shapes("features.18.1", 1280)}
    return shapes | {"classifier.1.weight": (1000, 1280), "classifier.1.bias": (1000,)}


def mobilenet_v1_shapes() -> dict[str, tuple[int, ...]]:
    """A depthwise and a pointwise convolution a block, from table 1 of the paper."""
    shapes = {"features.0.0.weight": (32, 3, 3, 3), **bn_shapes("features.0.1", 32)}
    c_in = 32
    for index, c_out in enumerate([64, 128, 128, 256, 256, *[512] * 6, 1024, 1024], start=1):
        prefix = f"features.{index}"
        shapes |= {f"{prefix}.0.0.weight": (c_in, 1, 3, 3), **bn_shapes(f"{prefix}.0.1", c_in)}
        shapes |= {f"{prefix}.1.0.weight": (c_out, c_in, 1, 1), **bn_shapes(f"{prefix}.1.1", c_out)}
        c_in = c_out
    return shapes | {"classifier.weight": (1000, 1024), "classifier.bias": (1000,)}


def mnasnet_shapes() -> dict[str, tuple[int, ...]]:
    """Keys and shapes as torchvision's published mnasnet1_0 checkpoint holds them."""
    stem = [(0, (32, 3, 3, 3)), (3, (32, 1, 3, 3)), (6, (16, 32, 1, 1))]
    shapes: dict[str, tuple[int, ...]] = {}
    for index, kernel in [*stem, (14, (1280, 320, 1, 1))]:
        shapes |= {f"layers.{index}.weight": kernel, **bn_shapes(f"layers.{index + 1}", kernel[0])}
    stacks = [(3, 3, 24, 3), (5, 3, 40, 3), (5, 6, 80, 3), (3, 6, 96, 2), (5, 6, 192, 4), (3, 6, 320, 1)]
    c_in = 16
    for stack, (kernel, expansion, c_out, depth) in enumerate(stacks, start=8):
        for block in range(depth):
            hidden = c_in * expansion
            kernels = [(hidden, c_in, 1, 1), (hidden, 1, kernel, kernel), (c_out, hidden, 1, 1)]
            for index, shape in zip((0, 3, 6), kernels, strict=True):
                prefix = f"layers.{stack}.{block}.layers"
                shapes |= {f"{prefix}.{index}.weight": shape, **bn_shapes(f"{prefix}.{index + 1}", shape[0])}
            c_in = c_out
    return shapes | {"classifier.1.weight": (1000, 1280), "classifier.1.bias": (1000,)}


PUBLISHED = {
    "resnet18": (resnet_shapes(False, (2, 2, 2, 2)), 122),
    "resnet50": (resnet_shapes(True, (3, 4, 6, 3)), 320),
    "mobilenet_v1": (mobilenet_v1_shapes(), 164),
    "mobilenet_v2": (mobilenet_v2_shapes(), 314),
    "mnasnet": (mnasnet_shapes(), 314),
}


def count_multiply_adds(model: torch.nn.Module, images: torch.Tensor) -> int:
    """Multiply-adds of convolutions and linear layers, counted on the tensors that really flow."""
    total = 0

    def count(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        per_output = layer.weight[0].numel()
        total += output.numel() * per_output // output.shape[0]

    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    model.eval()(images)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("name", PARAMETERS)
def test_state_dict_is_the_published_one(name: str) -> None:
    expected, entries = PUBLISHED[name]
    model = create_model(name)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    assert len(expected) == entries
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_multiply_adds_are_the_published_ones(name: str) -> None:
    with torch.no_grad():
        assert count_multiply_adds(create_model(name), torch.zeros(1, 3, 224, 224)) // 10**6 in (
            MULTIPLY_ADDS[name] - 1,
            MULTIPLY_ADDS[name],
        )


@pytest.mark.parametrize("size", [8, 15, 32])
@pytest.mark.parametrize("name", MODEL_BUILDERS)
def test_small_grey_images_train(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=7, in_channels=1, small_images=True, width_mult=0.25).train()
    logits = model(torch.randn(3, 1, size, size))
    logits.square().mean().backward()
    assert logits.shape == (3, 7)
    without_gradient = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without_gradient == []


@pytest.mark.parametrize("name", MODEL_BUILDERS)
def test_small_images_lose_less_resolution(name: str) -> None:
    sizes = {}
    for small_images in (False, True):
        model = create_model(name, width_mult=0.25, small_images=small_images).eval()
        before_pooling = {}
        model.avgpool.register_forward_pre_hook(lambda _, inputs, seen=before_pooling: seen.update(x=inputs[0]))
        with torch.no_grad():
            model(torch.zeros(1, 3, 64, 64))
        sizes[small_images] = before_pooling["x"].shape[-1]
    assert sizes == {False: 2, True: 8}


@pytest.mark.parametrize(
    ("name", "width_mult", "first", "last"),
    [
        ("resnet18", 0.25, 16, 128),
        ("resnet50", 0.5, 32, 1024),
        ("mobilenet_v2", 0.5, 16, 1280),
        ("mobilenet_v2", 1.4, 48, 1792),
        ("mobilenet_v1", 1.5, 48, 1536),
        ("mnasnet", 0.5, 16, 1280),
        ("mnasnet", 1.5, 48, 1920),
    ],
)
def test_width_mult_scales_to_multiples_of_eight(name: str, width_mult: float, first: int, last: int) -> None:
    model = create_model(name, width_mult=width_mult)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
    assert (convolutions[0].out_channels, linear.in_features) == (first, last)
    assert [m.out_channels for m in convolutions if m.out_channels % 8] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes=0: a classifier needs at least 1 class"),
        ({"in_channels": 0}, "in_channels=0: use 1 for grey images, 3 for colour"),
        ({"width_mult": 0.0}, "width_mult=0.0: must be above 0"),
        ({"width_mult": float("nan")}, "width_mult=nan: must be above 0"),
    ],
)
def test_impossible_option_is_refused(options: dict[str, float], message: str) -> None:
    for name in MODEL_BUILDERS:
        with pytest.raises(FastslimValueError, match=re.escape(message)):
            create_model(name, **options)


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(FastslimValueError, match="there is no model 'resnet81': did you mean 'resnet18'"):
        create_model("resnet81")
