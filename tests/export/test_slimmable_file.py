"""One file, several widths: each equals its subnet, with its own statistics, while no weight is copied."""

import copy

import pytest
import torch
from torch import nn
from trained_nets import NETS, shared, trained

import fastslim
from fastslim.algorithms import SlimmableNetwork
from fastslim.export import export_subnet, load_slimmable, save_slimmable, save_subnet

pytest.importorskip("safetensors")


def named(net):
    return {f"{ratio}x": subnet for ratio, subnet in net.subnets.items()}


@pytest.fixture
def saved(tmp_path):
    net = shared("concat")
    return save_slimmable(tmp_path / "net.safetensors", net.algo, named(net), metrics={"0.5x": 0.9})


@pytest.mark.parametrize("name", NETS)
def test_every_width_equals_its_subnet(name, tmp_path):
    net = shared(name, torch.float64)
    save_slimmable(tmp_path / "net.safetensors", net.algo, named(net))
    loaded = load_slimmable(tmp_path / "net.safetensors", net.build())
    assert loaded.widths == ["0.25x", "0.5x", "1.0x"]
    for _ in range(2):  # and back again
        for width, subnet in named(net).items():
            loaded.set_width(width)
            expected = export_subnet(net.algo, subnet)(net.images)
            torch.testing.assert_close(loaded(net.images), expected, rtol=1e-10, atol=1e-10)


def test_widths_have_names_and_indices(saved):
    net = load_slimmable(saved, shared("concat").build())
    assert net.width == "1.0x"
    net.set_width(-2)
    assert net.width == "0.5x" and net.subnet() == shared("concat").half
    assert net.description["subnets"]["0.5x"]["costs"]["flops"] < net.description["full_costs"]["flops"] / 2
    assert net.description["metrics"] == {"0.5x": 0.9}
    for wrong, message in (("0.5", "did you mean '0.5x'"), (3, "choose 0 to 2"), (None, "name or the index")):
        with pytest.raises(fastslim.FastslimError, match=message):
            net.set_width(wrong)
    assert net.width == "0.5x"


def test_widths_keep_the_order_they_were_given_in(tmp_path):
    net = shared("concat")
    subnets = {"slow": net.subnets[1.0], "fast": net.subnets[0.25], "medium": net.half}
    loaded = load_slimmable(save_slimmable(tmp_path / "n.safetensors", net.algo, subnets), net.build())
    assert loaded.widths == ["slow", "fast", "medium"] and loaded.width == "medium"
    for index, subnet in enumerate(subnets.values()):
        loaded.set_width(index)
        torch.testing.assert_close(loaded(net.images), export_subnet(net.algo, subnet)(net.images))


def test_it_is_for_inference_only(saved):
    net = load_slimmable(saved, shared("concat").build())
    assert not any(p.requires_grad for p in net.parameters()) and not net(shared("concat").images).requires_grad
    assert not any(module.training for module in net.modules())
    net.eval()
    with pytest.raises(fastslim.FastslimError, match="no training state"):
        net.train()


@pytest.mark.parametrize("name", ["concat", "rewritten"])
def test_copies_and_casts_switch_for_themselves(name, tmp_path):
    net = shared(name)
    save_slimmable(tmp_path / "net.safetensors", net.algo, named(net))
    loaded = load_slimmable(tmp_path / "net.safetensors", net.build())
    loaded.set_width(0)
    wide = copy.deepcopy(loaded).double()
    wide.set_width("0.5x")
    assert loaded.width == "0.25x"
    torch.testing.assert_close(loaded(net.images), export_subnet(net.algo, net.subnets[0.25])(net.images))
    expected = export_subnet(net.algo, net.half).double()(net.images.double())
    torch.testing.assert_close(wide(net.images.double()), expected, rtol=1e-10, atol=1e-10)


class OwnNorm(nn.BatchNorm2d):
    """Norm and activation in one class."""

    def forward(self, x):
        training = self.training
        y = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, self.momentum, self.eps
        )
        return y.relu()


def own_norm_net():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), OwnNorm(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, affine=False), nn.Flatten(),
        nn.Linear(128, 3),
    )  # fmt: skip


def test_a_norm_with_a_forward_of_its_own_switches_too(tmp_path):
    torch.manual_seed(0)
    images = torch.randn(8, 1, 8, 8)
    algo = fastslim.AutoSlim(architecture=own_norm_net(), example_inputs=images, choices=[0.5, 1], divisor=1)
    algo.train_step((images, torch.arange(8) % 3), torch.optim.SGD(algo.parameters(), lr=0.1))
    subnets = [algo.mutator.min_choices, algo.mutator.max_choices]
    fastslim.calibrate_batch_norm(algo, [(images, torch.zeros(8))], subnets)
    loaded = load_slimmable(save_slimmable(tmp_path / "n.safetensors", algo, subnets), own_norm_net())
    for index, subnet in enumerate(subnets):
        loaded.set_width(index)
        expected = export_subnet(algo, subnet).eval()(images)
        torch.testing.assert_close(loaded(images), expected, rtol=1e-5, atol=1e-6)


def test_a_slimmable_networks_own_scales_switch(tmp_path):
    net = shared("concat")
    units = dict(type="SlimmableChannelUnit", default_args=dict(candidate_choices=[0.5, 1.0], choice_mode="ratio"))
    torch.manual_seed(0)
    algo = SlimmableNetwork(
        architecture=net.build(),
        mutator=dict(type="SlimmableChannelMutator", channel_unit_cfg=units),
        example_inputs=net.images[:2],
    )
    for _ in range(2):
        algo.train_step((net.images, torch.arange(64) % 10), torch.optim.SGD(algo.parameters(), lr=0.1))
    subnets = algo.mutator.subnets
    loaded = load_slimmable(save_slimmable(tmp_path / "n.safetensors", algo, subnets), net.build())
    for index, subnet in enumerate(subnets):
        loaded.set_width(index)
        expected = export_subnet(algo, subnet).eval()(net.images)
        torch.testing.assert_close(loaded(net.images), expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(loaded.network.norm.weight_0, loaded.network.norm.weight_1[:8])


def test_an_uncalibrated_subnet_is_refused(tmp_path):
    net = trained("concat")
    other = {**net.half, "stem_(0, 16)_16": 4}
    with pytest.raises(fastslim.FastslimError, match=r"subnet '1' has only the statistics.*calibrate_batch_norm"):
        save_slimmable(tmp_path / "net.safetensors", net.algo, [net.half, other])
    assert not list(tmp_path.iterdir())
    assert net.algo.mutator.current_choices == net.algo.mutator.max_choices


def test_wrong_files_networks_and_arguments_are_told(saved, tmp_path):
    net = shared("concat")
    subnet = save_subnet(tmp_path / "half", net.algo, net.half)
    with pytest.raises(fastslim.FastslimError, match="no slimmable network: its format is 'fastslim-subnet-1'"):
        load_slimmable(subnet.path / "weights.safetensors", net.build())
    with pytest.raises(fastslim.FastslimError, match="another network.*no unit"):
        load_slimmable(saved, shared("resnet18").build(), example_inputs=net.images)
    model = net.build()
    fastslim.convert(model, net.images)
    with pytest.raises(fastslim.FastslimError, match="converted already"):
        load_slimmable(saved, model)
    with pytest.raises(fastslim.FastslimError, match="freshly built, got AutoSlim"):
        load_slimmable(saved, net.algo)
    with pytest.raises(fastslim.FastslimError, match="exists already"):
        save_slimmable(saved, net.algo, named(net))
    with pytest.raises(fastslim.FastslimError, match="takes an AutoSlim"):
        save_slimmable(tmp_path / "x.safetensors", net.algo.mutator, named(net))
    with pytest.raises(fastslim.FastslimError, match="list of subnets"):
        save_slimmable(tmp_path / "x.safetensors", net.algo, net.half)
    data = bytearray(saved.read_bytes())
    data[-9] ^= 8
    saved.write_bytes(data)
    with pytest.raises(fastslim.FastslimError, match="not those that were written"):
        load_slimmable(saved, net.build())
    with pytest.raises(fastslim.FastslimError, match="there is no file"):
        load_slimmable(tmp_path / "none.safetensors", net.build())
