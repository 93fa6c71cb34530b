"""The paper arithmetic of benchmarks/gpu against numbers worked out by hand."""

from __future__ import annotations

import arithmetic
import pytest
import shapes
import torch
from arithmetic import Ceilings, Cost

from fastslim import models

RESNET_WEIGHTS, MOBILENET_WEIGHTS = 25_502_912, 3_469_760


def test_depthwise_of_144_channels_needs_27_us():
    cost = arithmetic.depthwise_conv2d(shapes.Depthwise(144, 1, 56))["forward"]
    assert cost.bytes == 2 * (64 * 144 * 56 * 56 * 2)  # one image in, one out, in bf16
    assert cost.flops == 2 * 9 * 64 * 144 * 56 * 56
    assert cost.floor() == pytest.approx(26.9, abs=0.1)
    assert cost.binding() == "bytes"


def test_strided_depthwise_writes_a_quarter():
    cost = arithmetic.depthwise_conv2d(shapes.Depthwise(96, 2, 112), batch=1)["backward_weight"]
    assert cost.bytes == 96 * (112 * 112 + 56 * 56) * 2


def test_expansion_of_64_channels_needs_30_us():
    costs = arithmetic.slim_conv2d(shapes.Conv(64, 256, 1, 1, 56, 64, 256))
    rows = 64 * 56 * 56
    assert costs["forward"].bytes == (rows * 64 + rows * 256 + 64 * 256) * 2
    assert costs["forward"].flops == 2 * rows * 64 * 256
    assert costs["forward"].floor() == pytest.approx(29.9, abs=0.1)
    assert costs["backward_weight"].bytes == (rows * 64 + rows * 256) * 2 + 8 * 64 * 256


def test_dense_3x3_is_bound_by_flops():
    cost = arithmetic.slim_conv2d(shapes.Conv(512, 512, 3, 1, 7, 512, 512))["forward"]
    assert cost.flops == 2 * 64 * 49 * 9 * 512 * 512
    assert cost.floor() == pytest.approx(cost.flops / 790e12 * 1e6)
    assert cost.binding() == "FLOPs"


def test_strided_1x1_reads_only_the_pixels_it_needs():
    costs = arithmetic.slim_conv2d(shapes.Conv(256, 512, 1, 2, 56, 256, 512), batch=1)
    assert costs["forward"].bytes == (28 * 28 * 256 + 28 * 28 * 512 + 256 * 512) * 2
    assert costs["backward_input"].bytes == (56 * 56 * 256 + 28 * 28 * 512 + 256 * 512) * 2


def test_norm_reads_twice_what_the_cache_cannot_hold():
    large = arithmetic.batch_norm_act(shapes.Norm(256, 56, "relu"))  # 103 MB
    small = arithmetic.batch_norm_act(shapes.Norm(256, 14, "relu"))  # 6.4 MB
    assert large["forward"].bytes == 3 * 64 * 256 * 56 * 56 * 2
    assert large["backward"].bytes == 5 * 64 * 256 * 56 * 56 * 2
    assert small["forward"].bytes == 2 * 64 * 256 * 14 * 14 * 2
    assert small["backward"].bytes == 3 * 64 * 256 * 14 * 14 * 2


def test_residual_is_read_and_its_gradient_written():
    plain = arithmetic.batch_norm_act(shapes.Norm(256, 56, "relu"))
    masked = arithmetic.batch_norm_act(shapes.Norm(256, 56, "relu", residual=True))
    linear = arithmetic.batch_norm_act(shapes.Norm(256, 56, "none", residual=True))
    size = 64 * 256 * 56 * 56 * 2
    assert masked["forward"].bytes - plain["forward"].bytes == size
    assert masked["backward"].bytes - plain["backward"].bytes == 2 * size  # the mask read, dresidual written
    assert linear["backward"].bytes == plain["backward"].bytes  # dresidual is dy itself


def test_loss_reads_logits_once_and_writes_their_gradients():
    assert arithmetic.sandwich_loss(shapes.Loss(64, 1000))["forward_backward"].bytes == 2 * 4 * 64 * 1000 * 2


def test_packing_resnet50_moves_153_mb():
    cost = arithmetic.prefix_pack(RESNET_WEIGHTS)
    assert cost.bytes == pytest.approx(153e6, rel=0.001)
    assert cost.floor() == pytest.approx(36, abs=1)
    assert arithmetic.prefix_unpack_add(10).bytes == 10 * (2 + 4 + 4)


@pytest.mark.parametrize(("name", "weights"), [("resnet50", RESNET_WEIGHTS), ("mobilenet_v2", MOBILENET_WEIGHTS)])
def test_weights_of_the_networks_are_counted_right(name, weights):
    assert sum(p.numel() for p in getattr(models, name)().parameters() if p.dim() > 1) == weights


def test_other_ceilings_give_other_floors():
    cost = Cost(bytes=1000, flops=10_000, unit="matrix")
    assert cost.floor(Ceilings(copy=1e9, matrix=1e12)) == pytest.approx(1.0)
    assert cost.binding(Ceilings(copy=1e9, matrix=1e9)) == "FLOPs"


def test_every_shape_has_a_floor_in_the_table():
    lines = arithmetic.table().splitlines()
    listed = [line for line in lines if line.startswith("| depthwise_conv2d | forward | 144 ch, 3x3 s1, 56 px |")]
    assert len(listed) == 1
    assert "| 26.9 | bytes |" in listed[0]
    assert all(cost.floor() > 0 for *_, cost in arithmetic.all_costs())


def test_shapes_have_the_widths_they_are_asked_for():
    convs = list(shapes.convs(0.5, 0.25))
    assert convs[0][-2:] == (3, 16)  # images keep their channels
    assert (convs[3].active_in, convs[3].active_out) == (32, 64)
    assert all(conv.active_in <= conv.c_in and conv.active_out <= conv.c_out for conv in convs)
    assert [str(conv) for conv in shapes.convs()][3] == "64->256, 1x1, 56 px"
    assert str(convs[3]) == "32->64 of 64->256, 1x1, 56 px"


def conv_layers(name):
    """(c_in, c_out, kernel, stride, pixels of the input, groups) of every convolution of a network."""
    model, found = getattr(models, name)().to("meta"), set()

    def note(m, x):
        found.add((m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], x[0].shape[-1], m.groups))

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(note)
    model(torch.empty(1, 3, 224, 224, device="meta"))
    return found


def test_shapes_are_those_of_the_networks():
    found = conv_layers("resnet50") | conv_layers("resnet18") | conv_layers("mobilenet_v2")
    dense = {(*conv[:5], 1) for conv in shapes.convs()}
    depthwise = {(d.channels, d.channels, 3, d.stride, d.pixels, d.channels) for d in shapes.MOBILENET_DEPTHWISE}
    assert dense - found == set()
    assert depthwise - found == set()
