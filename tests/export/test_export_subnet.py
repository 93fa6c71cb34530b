"""A subnet as a plain network: what it holds, what it leaves behind, and that it runs without fastslim."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastslim


class Attention(nn.Module):
    """Head counts as constants, a parameter in forward, dropout that depends on the mode, keyword arguments."""

    def __init__(self, dim=16, heads=4):
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.qkv, self.proj, self.gamma = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Parameter(torch.randn(dim))

    def forward(self, x, scale=1.0, *, mask=None):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(b, n, c)
        return F.dropout(self.gamma * self.proj(x) * scale, 0.5, self.training)


class Net(nn.Module):
    """Embedding and head share their weight."""

    def __init__(self, layer=Attention):
        super().__init__()
        self.embed, self.attention, self.norm = nn.Embedding(11, 16), layer(), nn.LayerNorm(16)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(self.norm(x + self.attention(x, mask=None)))


TOKENS = torch.arange(10).view(2, 5)
SUBNET = {"embed_(0, 16)_16": 8, "attention.qkv_(0, 16)_48": 4}


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net().double().eval()
    fastslim.convert(model, TOKENS, choices=[0.25, 0.5, 1], divisor=1)
    return model


def test_equal_small_and_plain(net):
    mutator = fastslim.mutators.mutator_of(net)
    plain = fastslim.export_subnet(net, SUBNET)
    assert {name: unit.width for name, unit in zip(mutator.max_choices, mutator.mutable_units, strict=True)} == (
        mutator.max_choices
    )
    mutator.set_choices(SUBNET)
    torch.testing.assert_close(plain(TOKENS), net(TOKENS), rtol=1e-12, atol=1e-12)
    assert plain.attention.qkv.weight.shape == (12, 8) and plain.attention.gamma.shape == (8,)
    assert set(plain.state_dict()) == set(net.state_dict())
    assert not [m for m in plain.modules() if type(m).__module__.startswith("fastslim")]
    assert type(plain) is Net and not any("fastslim" in key for key in vars(plain))


def test_shared_weights_stay_shared(net):
    plain = fastslim.export_subnet(net, SUBNET)
    assert plain.head.weight is plain.embed.weight
    assert plain.embed.weight.data_ptr() != net.embed.weight.data_ptr()


def test_dropout_follows_the_mode(net):
    plain = fastslim.export_subnet(net, SUBNET)
    assert torch.equal(plain(TOKENS), plain(TOKENS))
    plain.train()
    assert not torch.equal(plain(TOKENS), plain(TOKENS))


def test_gradients_equal_the_supernets(net):
    plain = fastslim.export_subnet(net, SUBNET)
    fastslim.mutators.mutator_of(net).set_choices(SUBNET)
    for model in (plain, net):
        model(TOKENS).square().mean().backward()
    full = net.attention.gamma.grad
    torch.testing.assert_close(full[:8], plain.attention.gamma.grad)
    assert not full[8:].any()
    torch.testing.assert_close(net.embed.weight.grad[:, :8], plain.embed.weight.grad)


@pytest.mark.parametrize("source", ["model", "mutator", "algorithm"])
def test_every_source_gives_the_same(source):
    torch.manual_seed(0)
    model = Net().double().eval()
    distiller = None
    algo = fastslim.AutoSlim(
        architecture=model, example_inputs=TOKENS, choices=[0.25, 0.5, 1], divisor=1, distiller=distiller
    )
    model.__dict__["_fastslim_mutator"] = algo.mutator
    sources = {"model": model, "mutator": algo.mutator, "algorithm": algo}
    plain = fastslim.export_subnet(sources[source], SUBNET)
    assert plain.head.weight.shape == (11, 8)
    assert algo.mutator.current_choices == algo.mutator.max_choices


def test_a_plain_model_is_refused():
    with pytest.raises(fastslim.FastslimError, match=r"converted by fastslim.convert, got Linear"):
        fastslim.export_subnet(nn.Linear(3, 4))


def test_the_present_width_is_the_default(net):
    mutator = fastslim.mutators.mutator_of(net)
    mutator.set_choices(SUBNET)
    assert fastslim.export_subnet(net).head.weight.shape == (11, 8)
    assert mutator.current_choices == SUBNET


def test_it_loads_and_runs_without_fastslim(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 5))
    x = torch.randn(2, 3, 8, 8)
    report = fastslim.convert(model.eval(), x, divisor=1)
    plain = fastslim.export_subnet(model, report.mutator.min_choices)
    torch.save(plain, tmp_path / "plain.pt")
    torch.save((x, plain(x)), tmp_path / "data.pt")
    code = (
        "import sys, torch\n"
        "sys.modules['fastslim'] = None\n"
        f"plain = torch.load({str(tmp_path / 'plain.pt')!r}, weights_only=False)\n"
        f"x, y = torch.load({str(tmp_path / 'data.pt')!r})\n"
        "assert torch.equal(plain(x), y)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_a_mutator_does_not_export_statistics_of_another_subnet():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    algo = fastslim.AutoSlim(
        architecture=model.append(nn.Flatten()).append(nn.Linear(8 * 16, 2)),
        example_inputs=(2, 3, 8, 8),
        choices=[0.5, 1],
        divisor=1,
    )
    narrow = {**algo.mutator.max_choices, "0_(0, 8)_8": 4}
    full = algo.mutator.max_choices
    fastslim.calibrate_batch_norm(algo, [(torch.randn(4, 3, 8, 8), torch.zeros(4))], [full])
    algo.set_subnet(full)
    plain = fastslim.export_subnet(algo.mutator, narrow)
    assert torch.equal(plain[3].running_var, torch.ones(8))  # as wide as calibrated, but behind other channels
    assert model[3].calibrated is not None


def test_a_part_whose_name_a_graph_module_needs_itself_is_named() -> None:
    class Coder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.code, self.out = nn.Linear(6, 32), nn.Linear(32, 3)

        def forward(self, x):
            return self.out(self.code(x).view(-1, 32))

    model = Coder()
    mutator = fastslim.convert(model, torch.randn(2, 6)).mutator
    mutator.set_min_choices()
    with pytest.raises(ValueError, match="Coder cannot become a plain module.*give self.code another name"):
        fastslim.export_subnet(model)
