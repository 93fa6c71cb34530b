"""Attention with some of its heads is the plain attention of that size, masks, weights and fast paths included."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from layer_cases import randomised, span, spread
from torch import Tensor, nn

from fastslim import errors
from fastslim.nn import SlimLayerNorm, SlimLinear, SlimMultiheadAttention, turn_off_fast_paths

TIGHT = dict(rtol=1e-12, atol=1e-12)
HEADS, SIZE, BATCH, LENGTH, SOURCE = 4, 4, 3, 5, 6
FULL = HEADS * SIZE


def attention(cls: type = SlimMultiheadAttention, embed: int = FULL, heads: int = HEADS, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return randomised(cls(embed, heads, **kwargs).double())


def inputs(channels: tuple[int, int, int], batch_first=True, alone=False) -> list[Tensor]:
    torch.manual_seed(1)
    tensors = []
    for length, count in zip((LENGTH, SOURCE, SOURCE), channels, strict=True):
        shape = (length, count) if alone else (BATCH, length, count) if batch_first else (length, BATCH, count)
        tensors.append(torch.randn(shape, dtype=torch.float64, requires_grad=True))
    return tensors


def small(slim: SlimMultiheadAttention, heads: int, cuts: list[list[int]], rows: list[int], **kwargs) -> nn.Module:
    """A plain attention of few heads; `cuts` are the channels of query, key and value."""
    inner = heads * SIZE
    assert inner == len(cuts[0]) == len(rows)
    plain = attention(nn.MultiheadAttention, inner, heads, kdim=len(cuts[1]), vdim=len(cuts[2]), **kwargs)
    theirs = slim.state_dict()
    if "in_proj_weight" in theirs:
        weights = theirs["in_proj_weight"].chunk(3)
    else:
        weights = [theirs[f"{name}_proj_weight"] for name in "qkv"]
    with torch.no_grad():
        parts = [weight[:inner, cut] for weight, cut in zip(weights, cuts, strict=True)]
        if plain.in_proj_weight is not None:
            plain.in_proj_weight.copy_(torch.cat(parts))
        else:
            for name, part in zip("qkv", parts, strict=True):
                plain.get_parameter(f"{name}_proj_weight").copy_(part)
        plain.out_proj.weight.copy_(theirs["out_proj.weight"][rows, :inner])
        if plain.in_proj_bias is not None:
            plain.in_proj_bias.copy_(torch.cat([b[:inner] for b in theirs["in_proj_bias"].chunk(3)]))
            plain.out_proj.bias.copy_(theirs["out_proj.bias"][rows])
    return plain.train(slim.training)


def same(mine: tuple, theirs: tuple, sources: list[Tensor]) -> None:
    torch.testing.assert_close(mine[0], theirs[0], **TIGHT)
    assert (mine[1] is None) == (theirs[1] is None)
    if mine[1] is not None:
        torch.testing.assert_close(mine[1], theirs[1], **TIGHT)
    if mine[0].requires_grad:
        upstream = torch.randn_like(mine[0])
        pairs = (torch.autograd.grad(y[0], sources, upstream, retain_graph=True) for y in (mine, theirs))
        for own, other in zip(*pairs, strict=True):
            torch.testing.assert_close(own, other, **TIGHT)


CUTS = ((0, 3), (5, 5))
LAYOUTS = {
    "batch-first": dict(batch_first=True),
    "length-first": dict(batch_first=False),
    "no-bias": dict(bias=False, batch_first=True),
}


@pytest.mark.parametrize("weights", [dict(need_weights=False), {}, dict(average_attn_weights=False)], ids=str)
@pytest.mark.parametrize("alone", [False, True], ids=["batch", "alone"])
@pytest.mark.parametrize("separate", [False, True], ids=["packed", "separate"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_some_heads_are_the_plain_attention_of_that_size(layout, separate, alone, weights) -> None:
    kwargs = LAYOUTS[layout]
    slim = attention(**kwargs, **(dict(kdim=12, vdim=10) if separate else {}))
    cuts = [span(*CUTS), span((0, 7)), span((1, 9))]
    slim.set_width(out_segments=CUTS, segments=CUTS, heads=2, value_segments=((1, 9),))
    plain = small(slim, 2, cuts, span(*CUTS), **kwargs)
    x = inputs((8, 7, 9), kwargs["batch_first"], alone)
    same(slim(*x, **weights), plain(*x, **weights), x)
    exported = slim.to_torch(key_channels=7)
    assert type(exported) is nn.MultiheadAttention
    same(slim(*x, **weights), exported(*x, **weights), x)
    assert exported.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_self_attention_of_a_prefix(heads, training) -> None:
    slim = attention(batch_first=True).train(training)
    width = heads * SIZE
    slim.set_width(out=width, heads=heads)
    plain = small(slim, heads, 3 * [span((0, width))], span((0, width)), batch_first=True)
    x = inputs((width, width, width))[0]
    same(slim(x, x, x), plain(x, x, x), [x])
    for key, p in slim.named_parameters():
        their = dict(plain.named_parameters())[key]
        blocks = 3 if key.startswith("in_proj") else 1
        index = (span(*((i * FULL, width) for i in range(blocks))), span((0, width)))[: p.dim()]
        mine, other = (torch.autograd.grad(m(x, x, x)[0].sum(), q)[0] for m, q in ((slim, p), (plain, their)))
        torch.testing.assert_close(mine, spread(other, p, index), **TIGHT)
    exported = slim.to_torch(width)
    assert repr(exported) == repr(plain)
    assert exported.__dict__.keys() == plain.__dict__.keys()
    with torch.no_grad():
        same(exported(x, x, x), plain(x, x, x), [x])


def masks(kind: str, heads: int) -> dict:
    torch.manual_seed(2)
    hidden = torch.rand(LENGTH, SOURCE) < 0.3
    hidden[:, 0] = False
    padding = torch.zeros(BATCH, SOURCE, dtype=torch.bool)
    padding[1, 3:] = True
    causal = torch.ones(LENGTH, SOURCE, dtype=torch.bool).triu(1)
    per_head = torch.randn(BATCH, HEADS, LENGTH, SOURCE, dtype=torch.float64)[:, :heads].flatten(0, 1)
    return {
        "padding": dict(key_padding_mask=padding),
        "attention": dict(attn_mask=hidden),
        "both": dict(attn_mask=hidden, key_padding_mask=padding),
        "numbers": dict(attn_mask=torch.randn(LENGTH, SOURCE, dtype=torch.float64)),
        "per-head": dict(attn_mask=per_head),
        "per-head-and-padding": dict(attn_mask=per_head > 2, key_padding_mask=padding),
        "causal": dict(attn_mask=causal, is_causal=True),
        "causal-and-padding": dict(attn_mask=causal, is_causal=True, key_padding_mask=padding),
    }[kind]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "kind",
    ["padding", "attention", "both", "numbers", "per-head", "per-head-and-padding", "causal", "causal-and-padding"],
)
def test_masks_hide_what_they_hide_in_torch(kind, need_weights) -> None:
    slim = attention(batch_first=True, dropout=0.5)
    slim.set_width(out=8, heads=2)
    plain = small(slim, 2, 3 * [span((0, 8))], span((0, 8)), batch_first=True, dropout=0.5)
    x = inputs((8, 8, 8))
    for training in (False, True):
        results = []
        for layer, heads in ((slim, HEADS), (plain, 2), (slim, 2)):  # a mask of the active heads is as good
            torch.manual_seed(3)
            results.append(layer.train(training)(*x, need_weights=need_weights, **masks(kind, heads)))
        same(results[0], results[1], x)
        same(results[2], results[1], x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("separate", [False, True], ids=["packed", "separate"])
def test_full_width_is_torch_bit_for_bit(separate, training) -> None:
    kwargs = dict(batch_first=True, **(dict(kdim=12, vdim=10) if separate else {}))
    plain = attention(nn.MultiheadAttention, **kwargs).train(training)
    slim = SlimMultiheadAttention.from_torch(copy.deepcopy(plain))
    assert slim.state_dict().keys() == plain.state_dict().keys()
    x = inputs((16, 12, 10) if separate else (16, 16, 16))
    with torch.set_grad_enabled(training):
        for sources in (x, x) if separate else (x, 3 * x[:1]):
            for mine, their in zip(slim(*sources), plain(*sources), strict=True):
                assert torch.equal(mine, their)
    assert repr(slim).replace("Slim", "") == repr(plain)


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


def test_inactive_heads_and_channels_are_never_read() -> None:
    slim = attention(batch_first=True)
    slim.set_width(out=12, heads=2)
    x = inputs((10, 10, 10))
    expected = slim(*x)[0]
    with torch.no_grad():
        slim.in_proj_weight.view(3, FULL, FULL)[:, 8:] = float("nan")
        slim.in_proj_weight[:, 10:] = float("nan")
        slim.in_proj_bias.view(3, FULL)[:, 8:] = float("nan")
        slim.out_proj.weight[12:] = slim.out_proj.weight[:, 8:] = float("nan")
        slim.out_proj.bias[12:] = float("nan")
    y = slim(*x)[0]
    assert torch.equal(y, expected)
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in slim.parameters())


def test_copies_and_saved_layers_keep_their_width() -> None:
    slim = attention(batch_first=True)
    slim.set_width(out=12, heads=2, segments=((0, 2), (4, 8)))
    x = inputs((10, 16, 16))
    file = io.BytesIO()
    torch.save(slim, file)
    file.seek(0)
    for other in (copy.deepcopy(slim), torch.load(file, weights_only=False)):
        assert torch.equal(other(*x)[0], slim(*x)[0])
    assert "active_out=12, active_heads=2" in repr(slim)


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_options_without_a_slim_form_are_refused(option) -> None:
    with pytest.raises(errors.FastslimValueError, match=f"{option}=True has no slim form"):
        SlimMultiheadAttention.from_torch(nn.MultiheadAttention(FULL, HEADS, **{option: True}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(heads=5), "attention of 4 heads"),
        (dict(heads=0), "attention of 4 heads"),
        (dict(out=17), "choose 1 to 16"),
    ],
)
def test_widths_beyond_the_layer_are_refused(change, message) -> None:
    with pytest.raises(errors.FastslimValueError, match=message):
        attention().set_width(**change)


def test_inputs_that_do_not_fit_are_refused_in_words() -> None:
    slim = attention(batch_first=True)
    slim.set_width(out=8, heads=2)
    q, k, v = inputs((8, 8, 8))
    cases = [
        ((inputs((17, 8, 8))[0], k, v), {}, r"\(query\): the input has 17 channels, but the layer has only 16"),
        ((q, k, v[:, :2]), {}, "key and value of the same length"),
        ((q[:2], k, v), {}, "2 queries but 3 keys"),
        ((q, k, v), dict(is_causal=True), "give that, too"),
        ((q, k, v), dict(attn_mask=torch.zeros(2, 2)), r"must be \(5, 6\) or \(12, 5, 6\)"),
        ((q, k, v), dict(attn_mask=torch.zeros(5, LENGTH, SOURCE)), r"must be \(5, 6\) or \(12, 5, 6\)"),
        ((q, k, v), dict(key_padding_mask=torch.zeros(2, SOURCE)), r"must be \(3, 6\)"),
    ]
    for args, kwargs, message in cases:
        with pytest.raises(errors.FastslimValueError, match=message):
            slim(*args, **kwargs)
    with pytest.raises(errors.FastslimTypeError, match="make it boolean or floating point"):
        slim(q, k, v, attn_mask=torch.zeros(LENGTH, SOURCE, dtype=torch.int64))
