"""Attention with some of its heads is the plain attention of that size, masks, weights and layouts included."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from attention_cases import FULL, HEADS, LENGTH, SIZE, SOURCE, TIGHT, attention, inputs, masks, same, small
from layer_cases import span, spread
from torch import nn

from fastslim import errors
from fastslim.nn import SlimMultiheadAttention

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


def test_self_attention_on_channels_that_are_no_prefix() -> None:
    slim = attention(batch_first=True)
    slim.set_width(8, CUTS, CUTS, heads=2, key_segments=CUTS, value_segments=CUTS)
    plain = small(slim, 2, 3 * [span(*CUTS)], span(*CUTS), batch_first=True)
    x = inputs((8, 8, 8))[0]
    same(slim(x, x, x), plain(x, x, x), [x])
    exported = slim.to_torch()
    assert exported.in_proj_weight.shape == (24, 8)
    same(exported(x, x, x), plain(x, x, x), [x])


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
    slim.set_width(segments=((0, 2), (4, 6)))
    with pytest.raises(errors.FastslimValueError, match="set segments, key_segments and value_segments alike"):
        slim(q, q, q)
    with pytest.raises(errors.FastslimTypeError, match="make it boolean or floating point"):
        slim(q, k, v, attn_mask=torch.zeros(LENGTH, SOURCE, dtype=torch.int64))
