"""CRDLoss against a loop over samples, and its memory."""

import pytest
import torch

from fastslim import errors
from fastslim.distillers import CRDLoss


class Sample:
    def __init__(self, index, others=None):
        self.sample_idx = torch.tensor(index)
        if others is not None:
            self.contrast_sample_idxs = torch.tensor(others)


@pytest.fixture
def features():
    random = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 4, generator=random, dtype=torch.float64) for _ in "ST")
    return torch.nn.functional.normalize(student).requires_grad_(), torch.nn.functional.normalize(teacher)


def samples():
    return [Sample(1, [1, 0, 4]), Sample(6, [6, 6, 2]), Sample(3, [3, 5, 1])]


def side(features, memory, n, normalization=None):
    """Equations 17 and 18 of arXiv:1910.10699, sample by sample."""
    scores = torch.stack(
        [
            torch.stack([((f @ memory[j]) / 0.5).exp() for j in sample.contrast_sample_idxs])
            for f, sample in zip(features, samples(), strict=True)
        ]
    )
    if normalization is None:
        normalization = scores.mean().detach() * n
    scores, noise = scores / normalization, 2 / n
    loss = 0.0
    for row in scores:
        loss = loss - (row[0] / (row[0] + noise + 1e-7)).log() - (noise / (row[1:] + noise + 1e-7)).log().sum()
    return loss / len(features), normalization


def test_a_sample_is_told_from_others_by_both_sides(features):
    student, teacher = features
    loss = CRDLoss(2.0, temperature=0.5, neg_num=2, sample_n=7, dim_out=4).double()
    memories = loss.memory_v1.clone(), loss.memory_v2.clone()
    of_student, z_s = side(student, memories[1], 7)
    of_teacher, z_t = side(teacher, memories[0], 7)
    ours = loss(student, teacher, samples())
    torch.testing.assert_close(ours, 2 * (of_student + of_teacher))
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (ours, 2 * of_student)))
    for memory, before, feature in zip((loss.memory_v1, loss.memory_v2), memories, features, strict=True):
        for row, index in enumerate((1, 6, 3)):
            mixed = 0.5 * before[index] + 0.5 * feature[row].detach()
            torch.testing.assert_close(memory[index], mixed / mixed.norm())
        assert torch.equal(memory[[0, 2, 4, 5]], before[[0, 2, 4, 5]])
    # The normalisation of the first batch stays.
    memories = loss.memory_v1.clone(), loss.memory_v2.clone()
    again = side(student, memories[1], 7, z_s)[0] + side(teacher, memories[0], 7, z_t)[0]
    torch.testing.assert_close(loss(student, teacher, samples()), 2 * again)


def test_others_are_drawn_where_none_are_given(features):
    loss = CRDLoss(neg_num=5, sample_n=10, dim_out=4).double()
    plain = [{"sample_idx": torch.tensor(i)} for i in range(3)]
    assert torch.isfinite(loss(*features, plain))
    state = CRDLoss(neg_num=5, sample_n=10, dim_out=4).double()
    state.load_state_dict(loss.state_dict())
    assert torch.equal(state.normalization, loss.normalization)


def test_a_dataset_without_numbers_is_named(features):
    loss = CRDLoss(neg_num=5, sample_n=10, dim_out=4)
    with pytest.raises(errors.FastslimValueError, match="has no 'sample_idx'"):
        loss(*features, [{}, {}, {}])
    with pytest.raises(errors.FastslimTypeError, match="'sample_idx' must be a tensor, but got int"):
        loss(*features, [{"sample_idx": 1}] * 3)
    with pytest.raises(errors.FastslimValueError, match=r"should be \(3, 9\).* choose dim_out"):
        CRDLoss(neg_num=5, sample_n=10, dim_out=9)(*features, samples())
