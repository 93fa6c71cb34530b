"""The plain form of a narrow attention, and slim layers inside torch's own encoders."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from attention_cases import BATCH, FULL, HEADS, LENGTH, TIGHT, attention, inputs, masks, same
from layer_cases import randomised
from torch import Tensor, nn

from fastslim import errors
from fastslim.nn import SlimLayerNorm, SlimLinear, SlimMultiheadAttention, turn_off_fast_paths


def narrow(slim: SlimMultiheadAttention, channels: int, out: int) -> list[Tensor]:
    slim.set_width(out=out, heads=2)
    return inputs((channels, channels, channels))


@pytest.mark.parametrize("channels", [16, 11, 8])
def test_plain_form_where_heads_and_channels_differ(channels) -> None:
    slim = attention(batch_first=True, dropout=0.5)
    x = narrow(slim, channels, 16)
    exported = slim.to_torch(channels)
    assert all(type(m).__module__.split(".")[0] == "torch" for m in exported.modules() if m is not exported)
    own = 8 * 3 * channels + 3 * 8 + 16 * 8 + 16
    assert sum(p.numel() for p in exported.parameters()) == own
    file = io.BytesIO()
    torch.save(exported, file)
    assert b"fastslim" not in file.getvalue()
    file.seek(0)
    for form in (exported, copy.deepcopy(exported), torch.load(file, weights_only=False)):
        for training in (True, False):
            for kind in ("padding", "both", "per-head", "causal"):
                results = []
                for layer in (slim, form):
                    torch.manual_seed(3)
                    results.append(layer.train(training)(*x, **masks(kind, 2)))
                same(*results, x)
            assert form(*x, need_weights=False)[1] is None
        single = inputs((channels, channels, channels), alone=True)
        same(slim(*single), form(*single), single)


def encoder(norm_first: bool) -> tuple[nn.TransformerEncoder, list[SlimMultiheadAttention]]:
    """An encoder of slim layers, 12 of 16 channels, 2 of 4 heads, 10 of 24 hidden channels."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(FULL, HEADS, 24, batch_first=True, norm_first=norm_first, dropout=0.0)
    model = randomised(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double())
    slim_attention = []
    for block in model.layers:
        for name, cls, out in (
            ("linear1", SlimLinear, 10), ("linear2", SlimLinear, 12), ("norm1", SlimLayerNorm, 12),
            ("norm2", SlimLayerNorm, 12),
        ):  # fmt: skip
            setattr(block, name, cls.from_torch(getattr(block, name)))
            getattr(block, name).set_width(out=out)
        block.self_attn = SlimMultiheadAttention.from_torch(block.self_attn)
        block.self_attn.set_width(out=12, heads=2)
        slim_attention.append(block.self_attn)
    return model, slim_attention


@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_encoder_takes_no_fast_path_at_a_narrow_width(norm_first) -> None:
    model, _ = encoder(norm_first)
    x = torch.randn(BATCH, LENGTH, 12, dtype=torch.float64)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[2, 3:] = True
    for kwargs in ({}, dict(src_key_padding_mask=padding)):
        expected = model.train()(x, **kwargs)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x, **kwargs), expected, **TIGHT)
    exported = copy.deepcopy(model)
    for block in exported.layers:
        for name, channels in (("linear1", 12), ("linear2", 10), ("norm1", 12), ("norm2", 12), ("self_attn", 12)):
            setattr(block, name, getattr(block, name).to_torch(channels))
    assert not any("fastslim" in type(m).__module__ for m in exported.modules())
    for training in (True, False):
        with torch.set_grad_enabled(training):
            y = exported.train(training)(x, src_key_padding_mask=padding)
            torch.testing.assert_close(y, expected, **TIGHT)


def test_nested_tensors_of_an_encoder_are_refused_in_words() -> None:
    model, _ = encoder(norm_first=False)
    model.use_nested_tensor = True
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[2, 3:] = True
    with torch.no_grad(), pytest.raises(errors.FastslimTypeError, match="set its use_nested_tensor to False"):
        model.eval()(torch.randn(BATCH, LENGTH, 12, dtype=torch.float64), src_key_padding_mask=padding)


def test_encoders_call_their_slim_layers_once_the_fast_paths_are_off() -> None:
    model, _ = encoder(norm_first=False)
    model.use_nested_tensor = True
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[2, 3:] = True
    x = torch.randn(BATCH, LENGTH, 12, dtype=torch.float64)
    turn_off_fast_paths(model)
    expected = model.train()(x, src_key_padding_mask=padding)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, src_key_padding_mask=padding), expected, **TIGHT)

    layer = randomised(nn.TransformerEncoderLayer(FULL, HEADS, 24, batch_first=True, dropout=0.0).double())
    untouched = nn.Sequential(copy.deepcopy(layer))
    for name, out in (("linear1", 10), ("linear2", 16)):  # the attention stays torch's
        setattr(layer, name, SlimLinear.from_torch(getattr(layer, name)))
        getattr(layer, name).set_width(out=out)
    x = torch.randn(BATCH, LENGTH, FULL, dtype=torch.float64)
    turn_off_fast_paths(layer)
    turn_off_fast_paths(untouched)
    expected = layer.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected, **TIGHT)
    assert untouched[0].activation_relu_or_gelu == 1
