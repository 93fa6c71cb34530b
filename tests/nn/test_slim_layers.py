"""Slim layers take the place of torch's: same constructor, same state_dict, same numbers at full width."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from fastslim import errors
from fastslim.nn import SlimBatchNorm2d, SlimConv2d, SlimLinear, SwitchableBatchNorm2d

PAIRS = {
    "conv": (nn.Conv2d, SlimConv2d, (8, 16, 3), dict(padding=1, stride=2)),
    "conv-grouped": (nn.Conv2d, SlimConv2d, (8, 16, 3), dict(groups=4, bias=False)),
    "conv-depthwise": (nn.Conv2d, SlimConv2d, (8, 8, 3), dict(groups=8, padding=1)),
    "conv-same-even": (nn.Conv2d, SlimConv2d, (8, 16, 4), dict(padding="same")),
    "conv-reflect": (nn.Conv2d, SlimConv2d, (8, 16, 3), dict(padding=1, padding_mode="reflect")),
    "linear": (nn.Linear, SlimLinear, (8, 16), {}),
    "norm": (nn.BatchNorm2d, SlimBatchNorm2d, (8,), {}),
    "norm-cumulative": (nn.BatchNorm2d, SlimBatchNorm2d, (8,), dict(momentum=None)),
    "norm-plain": (nn.BatchNorm2d, SlimBatchNorm2d, (8,), dict(affine=False, track_running_stats=False)),
    "norm-switchable": (nn.BatchNorm2d, SwitchableBatchNorm2d, (8,), {}),
}


def pair(name: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    plain_class, slim_class, args, kwargs = PAIRS[name]
    torch.manual_seed(0)
    plain, slim = plain_class(*args, **kwargs).double(), slim_class(*args, **kwargs).double()
    slim.load_state_dict(plain.state_dict())
    shape = (5, 8) if name == "linear" else (5, 8, 7, 6)
    return plain, slim, torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_full_width_gives_torchs_numbers(name, training) -> None:
    plain, slim, x = pair(name)
    plain.train(training)
    slim.train(training)
    for _ in range(2):
        expected, y = plain(x), slim(x)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        upstream = torch.randn_like(y)
        theirs = torch.autograd.grad(expected, [x, *plain.parameters()], upstream)
        for mine, their in zip(torch.autograd.grad(y, [x, *slim.parameters()], upstream), theirs, strict=True):
            torch.testing.assert_close(mine, their, rtol=1e-12, atol=1e-12)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(slim.state_dict()[key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_from_torch_shares_parameters_hooks_and_modes(name) -> None:
    plain_class, slim_class, args, kwargs = PAIRS[name]
    plain = plain_class(*args, **kwargs).eval()
    calls = []
    plain.register_forward_hook(lambda *_: calls.append(1))
    slim = slim_class.from_torch(plain)
    assert not slim.training
    assert [id(p) for p in slim.parameters()] == [id(p) for p in plain.parameters()]
    assert slim.state_dict().keys() == plain.state_dict().keys()
    assert slim.extra_repr() == plain.extra_repr()
    slim(torch.randn((2, 8) if name == "linear" else (2, 8, 7, 6)))
    assert calls == [1]


def test_from_torch_refuses_what_it_would_lose() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(errors.FastslimTypeError, match="its own forward would be lost"):
        SlimConv2d.from_torch(Scaled(3, 8, 3))
    with pytest.raises(errors.FastslimTypeError, match="remove parametrizations"):
        SlimConv2d.from_torch(parametrizations.weight_norm(nn.Conv2d(3, 8, 3)))


def test_layers_used_by_hand_run_at_any_width() -> None:
    conv, norm, fc = SlimConv2d(3, 32, 3, padding=1), SlimBatchNorm2d(32), SlimLinear(32, 10)
    x = torch.randn(4, 3, 8, 8)
    for width in (1, 7, 24, 32):
        conv.set_width(out=width)
        y = fc(F.relu(norm(conv(x))).mean((2, 3)))
        z = F.batch_norm(F.conv2d(x, conv.weight[:width], conv.bias[:width], padding=1), None, None,
                         norm.weight[:width], norm.bias[:width], training=True)  # fmt: skip
        expected = F.linear(F.relu(z).mean((2, 3)), fc.weight[:, :width], fc.bias)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    conv.set_width()
    assert conv(x).shape[1] == 32


@pytest.mark.parametrize("out", [0, -1, 33, True, 8.0, "8"])
def test_set_width_refuses_what_the_layer_does_not_have(out) -> None:
    conv = SlimConv2d(3, 32, 3)
    with pytest.raises(errors.FastslimValueError, match="choose 1 to 32"):
        conv.set_width(out=out)
    assert conv.active_out == 32


def test_set_width_keeps_whole_groups() -> None:
    with pytest.raises(errors.FastslimValueError, match="whole groups of 4 output channels"):
        SlimConv2d(8, 16, 3, groups=4).set_width(out=6)


def test_repr_shows_a_width_that_is_not_full() -> None:
    conv = SlimConv2d(3, 32, 3)
    assert "active_out" not in repr(conv)
    conv.set_width(out=8)
    assert "active_out=8" in repr(conv)


def test_narrow_norm_updates_only_its_channels() -> None:
    norm = SlimBatchNorm2d(8)
    before = copy.deepcopy(norm.state_dict())
    norm(torch.randn(4, 3, 5, 5))
    assert torch.equal(norm.running_mean[3:], before["running_mean"][3:])
    assert not torch.equal(norm.running_mean[:3], before["running_mean"][:3])
    assert norm.num_batches_tracked == 1


def test_switchable_norm_keeps_a_set_per_width() -> None:
    norm = SwitchableBatchNorm2d(8, candidates=[2, 4, 8])
    assert {key.split(".")[1] for key in norm.state_dict() if key.startswith("candidate_bn")} == {"2", "4"}
    before = copy.deepcopy(norm.state_dict())
    norm(torch.randn(4, 4, 5, 5))
    changed = {key for key, value in norm.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"candidate_bn.4.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")}
    with pytest.raises(errors.FastslimValueError, match=r"its widths are \[2, 4, 8\]"):
        norm(torch.randn(4, 3, 5, 5))
    with pytest.raises(errors.FastslimValueError, match="candidate width 9 does not fit 8 channels"):
        SwitchableBatchNorm2d(8, candidates=[9])


def test_grouped_layers_refuse_a_width_that_their_input_does_not_give() -> None:
    conv = SlimConv2d(16, 16, 3, groups=16)
    conv.set_width(out=4)
    assert conv(torch.randn(1, 4, 5, 5)).shape[1] == 4
    with pytest.raises(errors.FastslimValueError, match="narrow or widen the layer before it"):
        conv(torch.randn(1, 16, 5, 5))


def test_float64_stays_float64_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert SlimConv2d(3, 8, 3).double()(torch.randn(1, 3, 5, 5).double()).dtype == torch.float64
        assert SlimLinear(3, 8).double()(torch.randn(1, 3).double()).dtype == torch.float64
