"""Comparisons that pass what is equal and stop what is not."""

import pytest
import torch
from trained_nets import NETS, shared, trained

import fastslim
from fastslim.export import check_export, export_subnet
from fastslim.export.equality import compare


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_an_exported_subnet_equals_the_supernet_right_after_training(name, dtype):
    net = shared(name, dtype)
    # Torch's own float32 MobileNet is 4e-5 off its float64 one after a single step: dozens of narrow batch norms.
    limit = 1e-10 if dtype == torch.float64 else 1e-4 if name == "mobilenet_v2" else 1e-5
    for subnet in net.subnets.values():
        equality = check_export(net.algo, export_subnet(net.algo, subnet), subnet, net.images)
        assert equality.relative < limit
        assert equality.scale > 0.01


def test_another_subnets_statistics_are_noticed():
    net = trained("resnet18")
    plain = export_subnet(net.algo, net.half)
    plain.bn1.running_mean += 0.01
    with pytest.raises(fastslim.FastslimError, match="the supernet at this subnet computes something else"):
        check_export(net.algo, plain, net.half, net.images)


def test_widths_and_modes_are_put_back():
    net = trained("concat")
    net.algo.set_subnet(net.subnets[0.25])
    plain = export_subnet(net.algo, net.half).train()
    check_export(net.algo.train(), plain, net.half)
    assert net.algo.mutator.current_choices == net.subnets[0.25]
    assert plain.training and plain.norm.training and net.algo.training


def test_nan_and_shape_are_infinitely_far():
    x = torch.ones(3)
    assert compare(x, torch.tensor([1.0, float("nan"), 1.0])).difference == float("inf")
    assert compare(x, torch.ones(2)).difference == float("inf")
    assert compare((x, x), (x, x.numpy())).difference == 0
    nan = torch.tensor([float("nan"), 2.0])
    assert compare(nan, nan.clone()).holds


def test_an_uncalibrated_subnet_leaves_with_a_warning():
    net = trained("resnet18")
    net.algo.drop_calibration()
    with pytest.warns(UserWarning, match="Calibrate first: fastslim.calibrate_batch_norm"):
        export_subnet(net.algo, net.half)
