"""Losses that compare relations, against double and triple loops."""

import math

import pytest
import torch
from torch.nn import functional as F

from fastslim import errors
from fastslim.distillers import AngleWiseRKD, ChannelWiseDivergence, DistanceWiseRKD, FBKDLoss, PKDLoss


def features(*shape):
    random = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=random, dtype=torch.float64) for _ in "ST")
    return student.requires_grad_(), teacher


def same_with_gradient(student, loss, truth):
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(*(torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, truth)))


def test_every_channel_is_a_distribution_over_places():
    student, teacher = features(2, 3, 4, 5)
    total = 0.0
    for n in range(2):
        for c in range(3):
            p, q = ((x[n, c].flatten() / 2).softmax(0) for x in (teacher, student))
            total = total + (p * (p / q).log()).sum()
    same_with_gradient(student, ChannelWiseDivergence(2.0, 3.0)(student, teacher), 3 * 4 * total / 6)


def test_normalised_features_have_the_distance_of_their_correlation():
    student, teacher = features(2, 3, 4, 5)
    rs = [
        torch.corrcoef(torch.stack((student[:, c].flatten(), teacher[:, c].flatten())))[0, 1] for c in range(3)
    ]  # arXiv:2207.02039, equation 3: the loss is 1 - r, up to (n - 1) / n and the guard of the deviation
    truth = 2 * sum(1 - r for r in rs) / 3 * 39 / 40
    loss = PKDLoss(2.0)(student, teacher)
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("resize_stu", [True, False])
def test_features_of_several_sizes_are_resized_and_added(resize_stu):
    student, teacher = features(2, 3, 4, 4)
    large = F.interpolate(teacher, (8, 8), mode="nearest") + 0.1 * torch.rand(2, 3, 8, 8, dtype=torch.float64)
    loss = PKDLoss(resize_stu=resize_stu)
    if resize_stu:
        alone = loss(F.interpolate(student, (8, 8), mode="bilinear"), large)
    else:
        alone = loss(student, F.interpolate(large, (4, 4), mode="bilinear"))
    torch.testing.assert_close(loss((student, student), (teacher, large)), loss(student, teacher) + alone)
    with pytest.raises(errors.FastslimValueError, match="the student has 1 features and the teacher 2"):
        loss(student, (teacher, large))
    with pytest.raises(errors.FastslimValueError, match="a connector can bring them together"):
        loss(student[:, :2], teacher)
    with pytest.raises(errors.FastslimValueError, match=r"should be \(N, C, H, W\)"):
        loss(student[0], teacher[0])


@pytest.mark.parametrize("normalize", [True, False])
def test_distances_of_pairs_are_compared_over_their_mean(normalize):
    student, teacher = features(5, 3, 2)
    tables = []
    for x in (student, teacher.flatten(1)[:, :4]):  # the teacher may be of another width
        rows = [row / row.norm() if normalize else row for row in x.flatten(1)]
        distance = [[(a - b).square().sum().sqrt() if a is not b else x.new_zeros(()) for a in rows] for b in rows]
        table = torch.stack([torch.stack(row) for row in distance])
        tables.append(table / (table.sum() / 20))
    difference = (tables[0] - tables[1]).abs()
    truth = torch.where(difference < 1, difference**2 / 2, difference - 0.5).mean()
    loss = DistanceWiseRKD(2.0, with_l2_norm=normalize)(student, teacher.flatten(1)[:, :4])
    same_with_gradient(student, loss, 2 * truth)


def test_equal_samples_have_a_finite_gradient():
    student = torch.ones(4, 3, requires_grad=True)
    for loss in (DistanceWiseRKD(), AngleWiseRKD()):
        student.grad = None
        loss(student, torch.randn(4, 3)).backward()
        assert torch.isfinite(student.grad).all()


def test_angles_of_triples_are_compared():
    student, teacher = features(4, 3)
    tables = []
    for x in (student, teacher):
        cosines = []
        for a in x:
            for b in x:
                for c in x:
                    edges = b - a, c - a
                    norms = [max(float(edge.norm().detach()), 1e-12) for edge in edges]
                    scale = edges[0].norm() * edges[1].norm() if min(norms) > 1e-12 else 1.0
                    cosines.append((edges[0] * edges[1]).sum() / scale)
        tables.append(torch.stack(cosines))
    difference = (tables[0] - tables[1]).abs()
    truth = torch.where(difference < 1, difference**2 / 2, difference - 0.5).sum() / 4**3
    torch.testing.assert_close(AngleWiseRKD(3.0, with_l2_norm=False)(student, teacher), 3 * truth)


@pytest.mark.parametrize("loss", [DistanceWiseRKD(), AngleWiseRKD()], ids=["distance", "angle"])
def test_batches_of_different_size_are_refused(loss):
    with pytest.raises(errors.FastslimValueError, match="the student has 2 samples and the teacher 3"):
        loss(torch.zeros(2, 3), torch.zeros(3, 3))


def test_feature_based_distillation_adds_four_distances():
    random = torch.Generator().manual_seed(0)
    places, channels, pooled, feature = (
        torch.rand(shape, generator=random, dtype=torch.float64)
        for shape in [(2, 2, 1, 3, 3), (2, 2, 4, 1, 1), (2, 4), (4, 2, 4, 3, 3)]
    )
    loss = FBKDLoss(1.0, 10.0, 100.0, 1000.0, loss_weight=2.0)(
        (places[0], channels[0], pooled, places[0], feature[0], feature[1]),
        (places[1], channels[1], places[1], feature[2], feature[3]),
    )
    masked = sum(((places[0] + places[1]) / 2 * (feature[3] - feature[1])[:, c : c + 1] ** 2).sum() for c in range(4))
    truth = math.sqrt(masked)
    truth += 10 * (feature[3].mean((2, 3)) - pooled).norm()
    truth += 100 * (places[1] - places[0]).norm()
    truth += 1000 * (feature[2] - feature[0]).norm()
    torch.testing.assert_close(loss, 2 * truth)
