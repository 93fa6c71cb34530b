"""torch.export programs: as good as the network on every batch size, as small as the subnet, refused with a reason."""

import os

import pytest
import torch
from torch import nn
from trained_nets import NETS, shared

import fastslim
from fastslim.export import export_subnet, export_torch


@pytest.mark.parametrize("name", NETS)
def test_a_program_equals_its_network_on_every_batch_size(name, tmp_path):
    net = shared(name)
    plain = export_subnet(net.algo, net.half).train()
    report = export_torch(tmp_path / "half.pt2", plain, net.images)
    assert report.batch_sizes == (64, 1, 2, 7)
    assert report.equality.relative <= 1e-5
    assert report.size == os.path.getsize(tmp_path / "half.pt2")
    assert plain.training
    program = torch.export.load(tmp_path / "half.pt2").module()
    torch.testing.assert_close(program(net.images[:5]), plain.eval()(net.images[:5]), rtol=1e-4, atol=1e-5)


def test_a_folded_program_of_a_fixed_batch_in_float64(tmp_path):
    net = shared("resnet18", torch.float64)
    plain = export_subnet(net.algo, net.half, fold_batch_norm=True)
    report = export_torch(tmp_path / "half.pt2", plain, net.images[:3], dynamic_batch=False)
    assert report.batch_sizes == (3,)
    assert report.equality.relative <= 1e-10
    with pytest.raises(AssertionError, match="Guard failed"):
        torch.export.load(tmp_path / "half.pt2").module()(net.images[:4])


def test_the_file_is_as_small_as_the_subnet(tmp_path):
    net = shared("resnet18")
    sizes, numbers = [], []
    for ratio in (1.0, 0.5):
        plain = export_subnet(net.algo, net.subnets[ratio], fold_batch_norm=True)
        sizes.append(export_torch(tmp_path / f"{ratio}.pt2", plain, net.images).size)
        numbers.append(sum(t.numel() * t.element_size() for t in plain.state_dict().values()))
    assert numbers[0] - numbers[1] > 1e6
    assert abs((sizes[0] - sizes[1]) / (numbers[0] - numbers[1]) - 1) < 0.01


class Several(nn.Module):
    """A pair of tensors, a constant, and a keyword that must be named."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, pair, scale=1.0, *, more):
        return {"sum": self.first(pair[0]) * scale + self.second(pair[1]), "more": more * 2}


def test_nested_arguments_and_outputs(tmp_path):
    pair = (torch.randn(4, 3), torch.randn(4, 5))
    inputs = {"pair": pair, "scale": 2.0, "more": torch.randn(4, 1)}
    assert export_torch(tmp_path / "several.pt2", Several(), inputs).difference == 0


class Any(nn.Module):
    def forward(self, *images):
        return sum(images)


def test_any_number_of_arguments(tmp_path):
    export_torch(tmp_path / "any.pt2", Any(), (torch.ones(2, 3), torch.ones(2, 3)))
    assert torch.export.load(tmp_path / "any.pt2").module()(torch.ones(5, 3), torch.ones(5, 3)).sum() == 30


class Deciding(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


def test_a_network_that_cannot_be_captured_is_named(tmp_path):
    with pytest.raises(fastslim.FastslimError, match=r"torch.export cannot take Deciding \(.*runs as it is") as caught:
        export_torch(tmp_path / "x.pt2", Deciding(), torch.ones(2, 3))
    assert caught.value.__cause__ is not None
    assert not os.listdir(tmp_path)


class Fixed(nn.Module):
    def forward(self, x):
        return x.view(2, -1)


def test_a_fixed_batch_size_is_told(tmp_path):
    with pytest.raises(fastslim.FastslimError, match="pass dynamic_batch=False"):
        export_torch(tmp_path / "x.pt2", Fixed(), torch.ones(2, 3))
    export_torch(tmp_path / "x.pt2", Fixed(), torch.ones(2, 3), dynamic_batch=False)


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


def test_a_program_that_computes_something_else_is_not_written(tmp_path):
    with pytest.raises(fastslim.FastslimError, match="the torch.export program, on a batch of 2, computes something"):
        export_torch(tmp_path / "x.pt2", Noisy(), torch.ones(2, 3))
    assert not os.listdir(tmp_path)


def test_a_supernet_is_sent_to_export_subnet(tmp_path):
    net = shared("concat")
    for source in (net.algo, net.algo.architecture):
        with pytest.raises(fastslim.FastslimError, match="takes the plain network that fastslim.export_subnet"):
            export_torch(tmp_path / "x.pt2", source, net.images)
    with pytest.raises(fastslim.FastslimError, match="got OrderedDict"):
        export_torch(tmp_path / "x.pt2", net.algo.state_dict(), net.images)


def test_an_existing_file_is_kept_unless_told(tmp_path):
    path, layer = tmp_path / "x.pt2", nn.Linear(3, 2)
    path.write_text("mine")
    with pytest.raises(fastslim.FastslimError, match="exists already"):
        export_torch(path, layer, torch.ones(2, 3))
    assert path.read_text() == "mine"
    export_torch(path, layer, torch.ones(2, 3), overwrite=True)
    assert torch.export.load(path).module()(torch.ones(1, 3)).shape == (1, 2)
    with pytest.raises(fastslim.FastslimError, match=r"must end in .pt2"):
        export_torch(tmp_path / "x.pt", layer, torch.ones(2, 3))
