"""MMRazor 0.x's retraining: one subnet as the whole network, or several together with batch norms of their own."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from test_slimmable_network import network

import fastslim
from fastslim.mutators import RatioPruner

WIDTHS = [(4, 8), (6, 20), (16, 32)]  # of the two units; the third is the full network


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.randint(0, 10, (6,))


def plain_network() -> torch.nn.Module:
    torch.manual_seed(0)
    return network().double()


def channel_cfg(first: int, second: int) -> dict[str, dict[str, int]]:
    """The file of a subnet in MMRazor 0.x's form."""
    return {
        "0": dict(in_channels=3, raw_in_channels=3, out_channels=first, raw_out_channels=16),
        "1": dict(out_channels=first, raw_out_channels=16),
        "3": dict(in_channels=first, raw_in_channels=16, out_channels=second, raw_out_channels=32),
        "4": dict(out_channels=second, raw_out_channels=32),
        "8": dict(in_channels=second, raw_in_channels=32, out_channels=10, raw_out_channels=10),
    }


def retraining(channel_cfg, **options) -> fastslim.AutoSlim:
    pruner = dict(type="RatioPruner", ratios=[0.25, 0.5, 1.0])
    options = {"architecture": plain_network(), "input_shape": (3, 16, 16), "pruner": pruner, **options}
    return fastslim.AutoSlim(retraining=True, channel_cfg=channel_cfg, **options)


def test_several_subnets_equal_a_loop_with_batch_norms_for_each() -> None:
    algo, plain = retraining([channel_cfg(*widths) for widths in WIDTHS]), plain_network()
    norms = [copy.deepcopy(torch.nn.ModuleList([plain[1], plain[4]])) for _ in WIDTHS]
    own = torch.nn.ModuleList([plain, *norms])
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, 0.9) for m in (algo, own)]
    images, labels = batch()
    for _ in range(3):
        losses = algo.train_step({"img": images, "gt_label": labels}, optimizers[0])["log_vars"]
        optimizers[1].zero_grad()
        for index, (a, b) in enumerate(WIDTHS):
            x = F.conv2d(images, plain[0].weight[:a], None, 1, 1)
            for channels, norm in ((a, norms[index][0]), (b, norms[index][1])):
                mean, var, weight, bias = (
                    tensor[:channels] for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
                )
                x = F.relu(F.batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-5))
                if channels == a:
                    x = F.conv2d(x, plain[3].weight[:b, :a], None, 2, 1)
            loss = F.cross_entropy(F.linear(x.mean((2, 3)), plain[8].weight[:, :b], plain[8].bias), labels)
            loss.backward()
            assert losses[f"subnet_{index}.loss"] == pytest.approx(loss.item(), abs=1e-12)
        optimizers[1].step()
    assert losses["loss"] == pytest.approx(sum(losses[f"subnet_{i}.loss"] for i in range(3)))
    for position in (0, 3, 8):
        torch.testing.assert_close(algo.architecture[position].weight, plain[position].weight, rtol=0, atol=1e-12)
    for place, position in enumerate((1, 4)):
        mine = algo.architecture[position]
        for index, bn in enumerate((mine, *mine.further_bns)):
            for name in ("weight", "bias", "running_mean", "running_var"):
                theirs = getattr(norms[index][place], name)
                torch.testing.assert_close(getattr(bn, name), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["dict", "file", "widths"])
def test_one_subnet_becomes_the_whole_network_and_keeps_the_weights(form, tmp_path) -> None:
    subnet = channel_cfg(6, 20)
    if form == "file":
        path = tmp_path / "subnet.json"
        path.write_text(json.dumps(subnet))
        subnet = str(path)
    elif form == "widths":
        pruner = RatioPruner([0.25, 1.0], example_inputs=(1, 3, 16, 16))
        pruner.prepare_from_supernet(network())
        subnet = dict(zip(pruner.search_spaces, (6, 20), strict=True))
    algo, plain = retraining(subnet), plain_network()
    assert algo.architecture[3].weight.shape == (20, 6, 3, 3)
    assert torch.equal(algo.architecture[3].weight, plain[3].weight[:20, :6])
    small = fastslim.export_subnet(algo)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, 0.9) for m in (algo, small)]
    images, labels = batch()
    for _ in range(3):
        losses = algo.train_step((images, labels), optimizers[0])
        optimizers[1].zero_grad()
        loss = F.cross_entropy(small(images), labels)
        loss.backward()
        optimizers[1].step()
        assert list(losses) == ["loss"]
        torch.testing.assert_close(losses["loss"], loss.detach(), rtol=0, atol=1e-12)
    for mine, theirs in zip(algo.architecture.state_dict().values(), small.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_what_a_pruner_exports_is_what_retraining_takes() -> None:
    supernet = fastslim.AutoSlim(
        architecture=network(), pruner=dict(type="RatioPruner", ratios=[0.25, 1.0]), input_shape=(1, 3, 16, 16)
    )
    supernet.set_min_subnet()
    exported = json.loads(json.dumps(supernet.mutator.export_subnet()))
    assert exported == channel_cfg(4, 8)
    assert retraining(exported).architecture[0].out_channels == 4


@pytest.mark.parametrize(
    ("subnet", "error", "message"),
    [
        (None, TypeError, "retraining=True needs channel_cfg"),
        ([], TypeError, r"retraining=True needs channel_cfg.*but got \[\]"),
        ([3], TypeError, "or a list of subnets, but got 3"),
        ({"0": dict(out_channels=4, raw_out_channels=64)}, ValueError, "another network: layer '0' has 16 output"),
        ({"zero": dict(out_channels=4)}, ValueError, "no layer is called 'zero'"),
        ({"0": dict(out_channels=99)}, ValueError, "99"),
        ({"0_(0, 16)_61": 4}, ValueError, "did you mean '0_"),
        ("nowhere.json", OSError, "nowhere.json"),
    ],
)
def test_a_subnet_that_does_not_fit_is_named(subnet, error, message) -> None:
    with pytest.raises(error, match=message):
        retraining(subnet)


def test_one_name_for_the_pruner() -> None:
    with pytest.raises(ValueError, match="pruner is the old name of mutator"):
        retraining(channel_cfg(4, 8), mutator=dict(type="OneShotChannelMutator"))


def test_retraining_wants_a_pruner() -> None:
    with pytest.raises(TypeError, match="pruner should be a `dict` or `RatioPruner` instance"):
        retraining(channel_cfg(4, 8), pruner=dict(type="OneShotChannelMutator"))
