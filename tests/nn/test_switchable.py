"""Batch norms with several sets of parameters and statistics."""

import pytest
import torch
from torch import nn

from fastslim.errors import FastslimValueError
from fastslim.nn import IndexedBatchNorm2d, SlimBatchNorm2d, SwitchableBatchNorm2d


@pytest.mark.parametrize("width", [6, 4])
def test_the_chosen_set_is_a_batch_norm_of_its_own(width):
    layer = IndexedBatchNorm2d(6, num_bns=3, momentum=0.3)
    own = [SlimBatchNorm2d(6, momentum=0.3) for _ in range(3)]
    for index in (0, 2, 1, 2):
        layer.select(index)
        x = torch.randn(4, width, 3, 3)
        torch.testing.assert_close(layer(x, x, "relu"), own[index](x, x, "relu"))
    layer.eval()
    for index in range(3):
        layer.select(index)
        layer.set_width(out=width)
        expected = own[index].eval()(x)
        torch.testing.assert_close(layer(x), expected)
        plain = layer.to_torch()
        assert type(plain) is nn.BatchNorm2d and plain.num_features == width and "index" not in vars(plain)
        torch.testing.assert_close(plain(x), expected)


def test_segments_reach_the_chosen_set():
    layer = IndexedBatchNorm2d(6, num_bns=2)
    layer.select(1)
    layer.set_width(out=3, segments=((1, 1), (3, 2)))
    layer(torch.randn(4, 3, 2, 2) + 5)
    further = layer.further_bns[0]
    assert (further.running_mean[[1, 3, 4]] > 0.2).all() and (further.running_mean[[0, 2, 5]] == 0).all()
    assert (layer.running_mean == 0).all()


def test_further_sets_start_as_copies():
    plain = nn.BatchNorm2d(4).double()
    nn.init.uniform_(plain.weight)
    plain.running_var.fill_(3)
    layer = IndexedBatchNorm2d.from_torch(plain)
    layer.init_sets(2)
    further = layer.further_bns[0]
    assert further.weight is not plain.weight and torch.equal(further.weight, plain.weight)
    assert further.running_var.dtype == torch.float64 and torch.equal(further.running_var, plain.running_var)
    assert layer.weight is plain.weight and layer.index == 0


@pytest.mark.parametrize("index", [-1, 2, 1.0, None])
def test_a_set_that_is_not_there_is_refused(index):
    layer = IndexedBatchNorm2d(4, num_bns=2)
    with pytest.raises(FastslimValueError, match="has no set; choose 0 to 1"):
        layer.select(index)
    assert layer.index == 0


def test_sets_by_width_are_kept_when_more_widths_come():
    layer = SwitchableBatchNorm2d(8, candidates=[2, 4])
    first = layer.candidate_bn["4"]
    layer.init_candidates([4, 6, 8])
    assert list(layer.candidate_bn) == ["2", "4", "6"] and layer.candidate_bn["4"] is first
