"""What cannot be slimmed is refused with a way out, or stays at full width; a refused model is as it was."""

import pytest
import torch
from torch import nn
from zoo.between import conv_net
from zoo.check import assert_untouched, snapshot

import fastslim
from fastslim import ops
from fastslim.errors import FastslimError

IMAGE = torch.randn(2, 3, 8, 8)


def fails_half_way():
    def middle(net, x):
        net.bn(x)
        raise KeyError("levels")

    return conv_net(middle).train()


def quantised():
    return torch.ao.quantization.quantize_dynamic(
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), {nn.Linear}
    )


def half_quantised():
    net = conv_net()
    net.head = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(16, 5)), {nn.Linear})
    return net


REFUSED = {
    "lazy": (lambda: conv_net(extra=lambda n, m: nn.LazyLinear(4)), IMAGE, "[Ll]azy|run the model once"),
    "lazy in use": (
        lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.Conv2d(8, 4, 3)),
        IMAGE,
        "[Ll]azy|run the model once",
    ),
    "channels": (conv_net, torch.randn(2, 4, 8, 8), "example"),
    "dimensions": (conv_net, torch.randn(3, 2), "example"),
    "meta inputs": (conv_net, torch.randn(2, 3, 8, 8, device="meta"), "device|meta"),
    "too many": (conv_net, (IMAGE, IMAGE), "example|argument"),
    "unknown keyword": (conv_net, {"pixels": IMAGE}, "example_inputs"),
    "empty": (conv_net, (), "example|argument"),
    "text": (conv_net, "image", "example"),
    "error in forward": (fails_half_way, IMAGE, "levels"),
    "scripted": (lambda: torch.jit.trace(conv_net().eval(), IMAGE), IMAGE, "[Ss]cript|jit"),
    "no module": (lambda: torch.relu, IMAGE, "Module"),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_way_out_and_untouched(case):
    build, inputs, message = REFUSED[case]
    model = build()
    before = snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises(FastslimError, match=message):
        fastslim.convert(model, inputs)
    if before is not None:
        assert_untouched(model, before)


OPTIONS = {
    "ratio of nothing": (dict(choices=[0.0, 1.0]), "choices|ratio"),
    "ratio above one": (dict(choices=[0.5, 1.5]), "choices|ratio"),
    "no ratios": (dict(choices=[]), "choices"),
    "divisor": (dict(divisor=0), "divisor"),
    "exclude": (dict(exclude=["layer9.*"]), "layer9"),
    "include": (dict(include=["layer9.*"]), "layer9"),
    "random widths": (dict(random_widths="some"), "random_widths"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options_are_refused_before_anything_changes(case):
    options, message = OPTIONS[case]
    model = conv_net()
    before = snapshot(model)
    with pytest.raises(FastslimError, match=message):
        fastslim.convert(model, IMAGE, **options)
    assert_untouched(model, before)


def test_a_converted_model_is_not_converted_again():
    model = conv_net()
    fastslim.convert(model, IMAGE)
    with pytest.raises(FastslimError, match="already"):
        fastslim.convert(model, IMAGE)


@pytest.mark.parametrize("build", [quantised, half_quantised])
def test_quantised_layers_are_refused_or_stay(build):
    model = build()
    inputs = torch.randn(2, 8) if build is quantised else IMAGE
    expected, before = model(inputs), snapshot(model)
    try:
        mutator = fastslim.convert(model, inputs).mutator
    except FastslimError as error:
        refusal = str(error)
    else:
        mutator.set_min_choices()
        assert torch.isfinite(model(inputs)).all()
        mutator.set_max_choices()
        with ops.use_backend("reference"):
            assert torch.equal(model(inputs), expected)
        return
    assert "quanti" in refusal
    assert_untouched(model, before)
