"""Batch norms multiplied into the layers before them: equal, and only where nothing else is read."""

import pytest
import torch
from torch import nn
from trained_nets import NETS, shared

import fastslim
from fastslim.export import check_export, export_subnet, fold_batch_norm


def norms(module):
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def settled(module, *shape):
    """Statistics and scales as after some training."""
    torch.manual_seed(0)
    for _ in range(3):
        module.train()(torch.randn(*shape) * 2 + 1)
    for norm in norms(module):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    return module.eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", NETS)
def test_a_folded_subnet_equals_the_supernet(name, dtype):
    net = shared(name, dtype)
    folded = export_subnet(net.algo, net.half, fold_batch_norm=True)
    assert not norms(folded)
    assert next(folded.parameters()).dtype == dtype
    equality = check_export(net.algo, folded, net.half, net.images)
    limit = 1e-10 if dtype == torch.float64 else 1e-4 if name == "mobilenet_v2" else 1e-5
    assert equality.relative < limit


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Conv1d(3, 5, 3, padding_mode="circular", padding=1), nn.BatchNorm1d(5)], (4, 3, 9)),
        ([nn.Conv3d(2, 4, 3, bias=False), nn.BatchNorm3d(4)], (2, 2, 4, 4, 4)),
        ([nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6)], (2, 4, 5, 5)),
        ([nn.Linear(3, 5), nn.BatchNorm1d(5)], (4, 3)),
        ([nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)], (2, 4, 5, 5)),
    ],
    ids=["conv1d", "conv3d", "conv_transpose2d", "linear", "grouped"],
)
def test_every_kind_of_layer_folds(layers, shape):
    net = settled(nn.Sequential(*layers), *shape)
    folded = fold_batch_norm(net, torch.zeros(shape))
    assert not norms(folded)
    assert len(norms(net)) == 1
    x = torch.randn(shape)
    torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-5)


class ReadTwice(nn.Sequential):
    def forward(self, x):
        y = self[0](x)
        return self[1](y) + y


class ReadsItsNorm(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x)) * self[1].weight[0]


class CalledTwice(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x)) + self[0](x + 1)


class Returned(nn.Sequential):
    def forward(self, x):
        y = self[0](x)
        return self[1](y), y


class Own(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize("net", [ReadTwice, ReadsItsNorm, CalledTwice, Returned, nn.Sequential])
def test_what_something_else_reads_is_left_alone(net):
    layer = Own if net is nn.Sequential else nn.BatchNorm2d
    module = settled(net(nn.Conv2d(3, 4, 3), layer(4)), 2, 3, 5, 5)
    folded = fold_batch_norm(module, torch.randn(2, 3, 5, 5))
    assert len(norms(folded)) == 1


def test_a_layer_with_a_hook_is_left_alone():
    module = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 2, 3, 5, 5)
    module[0].register_forward_hook(lambda layer, args, output: output * 2)
    assert len(norms(fold_batch_norm(module, torch.randn(2, 3, 5, 5)))) == 1


def test_shared_weights_are_left_alone():
    module = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    module[2].weight = module[0].weight
    module = settled(module, 2, 4, 5, 5)
    assert len(norms(fold_batch_norm(module, torch.randn(2, 4, 5, 5)))) == 2


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(fastslim.FastslimError, match="cannot be run on the example inputs"):
        fold_batch_norm(nn.Conv2d(3, 4, 3), torch.randn(2, 5, 5, 5))
