"""The losses of features against their formulas, written out sample by sample."""

import pytest
import torch
from torch.nn import functional as F

from fastslim import errors
from fastslim.distillers import ABLoss, ATLoss, FTLoss, L1Loss, L2Loss, MGDLoss, OFDLoss


@pytest.fixture(params=[(5, 7), (5, 4, 3), (5, 4, 3, 2)], ids=["1d", "2d", "3d"])
def features(request):
    random = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(request.param, generator=random, dtype=torch.float64) for _ in "ST")
    return student.requires_grad_(), teacher


def same_with_gradient(student, loss, truth):
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(*(torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, truth)))


def test_l1_loss(features):
    student, teacher = features
    same_with_gradient(student, L1Loss(loss_weight=2.0)(student, teacher), 2 * (student - teacher).abs().mean())


@pytest.mark.parametrize(
    ("options", "truth"),
    [
        ({"reduction": "sum"}, lambda d: d.sum()),
        ({"reduction": "batchmean"}, lambda d: d.sum() / 5),
        ({"reduction": "none"}, lambda d: d),
        ({"size_average": False}, lambda d: d.sum()),
        ({"size_average": True, "reduction": "sum"}, lambda d: d.mean()),
        ({"reduce": False}, lambda d: d),
    ],
)
def test_l1_reductions(features, options, truth):
    student, teacher = features
    torch.testing.assert_close(L1Loss(**options)(student, teacher), truth((student - teacher).abs()))


@pytest.mark.parametrize("normalize", [True, False])
def test_l2_loss(features, normalize):
    student, teacher = features
    a, b = (x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True) if normalize else x.flatten(1) for x in features)
    square = ((a - b) ** 2).sum()
    same_with_gradient(student, L2Loss(normalize=normalize)(student, teacher), square / 5)
    same_with_gradient(student, L2Loss(3.0, normalize, dist=True)(student, teacher), 3 * square.sqrt())
    divided = L2Loss(normalize=normalize, div_element=True)(student, teacher)
    torch.testing.assert_close(divided, square / student.numel())
    # `mult` is the length that features are normalised to.
    scaled = L2Loss(normalize=normalize, mult=2.0)(student, teacher)
    torch.testing.assert_close(scaled, (4 if normalize else 1) * square / 5)


def test_l2_distance_of_equal_features_has_a_gradient():
    x = torch.ones(2, 3, requires_grad=True)
    L2Loss(dist=True)(x, x.detach()).backward()
    assert torch.equal(x.grad, torch.zeros(2, 3))


def test_attention_is_compared_place_by_place(features):
    student, teacher = features
    maps = []
    for x in features:
        square = sum(x[:, c] ** 2 for c in range(x.shape[1])) / x.shape[1]
        rows = square.reshape(5, -1)
        maps.append(rows / rows.square().sum(1, keepdim=True).sqrt())
    truth = 3 * ((maps[0] - maps[1]) ** 2).sum() / maps[0].numel()
    if maps[0].shape[1] == 1:  # one place is all the attention there is
        assert ATLoss(3.0)(student, teacher) == 0
    else:
        same_with_gradient(student, ATLoss(loss_weight=3.0)(student, teacher), truth)


def test_attention_needs_no_equal_channels():
    x = torch.randn(2, 8, 4, 4)
    assert ATLoss()(x[:, :3], x) > 0
    with pytest.raises(errors.FastslimValueError, match="a connector can bring them together"):
        ATLoss()(x[:, :, :2], x)


def test_factors_are_compared_at_length_one(features):
    student, teacher = features
    rows = [
        (s / s.norm() - t / t.norm()).abs().sum() for s, t in zip(student.flatten(1), teacher.flatten(1), strict=True)
    ]
    same_with_gradient(student, FTLoss(2.0)(student, teacher), 2 * sum(rows) / student.numel())


def test_activation_boundaries_are_pushed_beyond_a_margin(features):
    student, teacher = features
    lacks = []
    for s, t in zip(student.flatten(), teacher.flatten(), strict=True):
        wanted = s < 0.5 if t > 0 else s > -0.5
        lacks.append((s - (0.5 if t > 0 else -0.5)) ** 2 if wanted else 0 * s)
    same_with_gradient(student, ABLoss(2.0, margin=0.5)(student, teacher), 2 * sum(lacks) / 5 / 1000 * 3)


def test_a_partial_distance_counts_only_what_matters(features):
    student, teacher = features
    places = [
        (s - t) ** 2 if s > t or t > 0 else 0 * s for s, t in zip(student.flatten(), teacher.flatten(), strict=True)
    ]
    same_with_gradient(student, OFDLoss(2.0, mul_factor=10)(student, teacher), 2 * sum(places) / 5 / 10)
    below = torch.tensor([[-3.0, -2.0]])  # inactive in the teacher, and still less in the student
    assert OFDLoss()(below - 1, below) == 0 < OFDLoss()(below + 1, below)


def test_masked_generation_is_a_squared_distance(features):
    student, teacher = features
    same_with_gradient(
        student, MGDLoss(0.1)(student, teacher), 0.1 * F.mse_loss(student, teacher) * student.numel() / 5
    )


@pytest.mark.parametrize("loss", [L1Loss(), L2Loss(), FTLoss(), ABLoss(), OFDLoss(), MGDLoss()], ids=str)
def test_features_of_different_width_name_the_connector(loss):
    with pytest.raises(errors.FastslimValueError, match="a connector can bring them together"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4))
