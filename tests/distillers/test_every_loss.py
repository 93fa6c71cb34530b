"""What every distillation loss must do: the right gradient, half precision, a name in the registry."""

import pytest
import torch

from fastslim import distillers
from fastslim.registry import MODELS

LABELS = torch.tensor([0, 3, 2])
# Loss, options, shape of both features, further arguments.
CASES = [
    ("KLDivergence", {"tau": 2.0}, (3, 5), ()),
    ("KDSoftCELoss", {"tau": 2.0}, (3, 5), ()),
    ("CrossEntropyLoss", {}, (3, 5), ()),
    ("DKDLoss", {"tau": 2.0}, (3, 5), (LABELS,)),
    ("DISTLoss", {}, (3, 5), ()),
    ("WSLD", {"num_classes": 5, "tau": 2.0}, (3, 5), (LABELS,)),
    ("AdaptiveLossSoft", {"iw_clip": 1e9}, (3, 5), ()),
    ("L1Loss", {}, (3, 4, 2, 2), ()),
    ("L2Loss", {}, (3, 4, 2, 2), ()),
    ("ATLoss", {}, (3, 4, 2, 2), ()),
    ("FTLoss", {}, (3, 4, 2, 2), ()),
    ("ABLoss", {}, (3, 4, 2, 2), ()),
    ("OFDLoss", {}, (3, 4, 2, 2), ()),
    ("MGDLoss", {}, (3, 4, 2, 2), ()),
    ("ChannelWiseDivergence", {"tau": 2.0}, (3, 4, 2, 2), ()),
    ("PKDLoss", {}, (3, 4, 2, 2), ()),
    ("DistanceWiseRKD", {}, (3, 4, 2, 2), ()),
    ("AngleWiseRKD", {}, (3, 4, 2, 2), ()),
]
EVERY = pytest.mark.parametrize(("name", "options", "shape", "more"), CASES, ids=[case[0] for case in CASES])


def features(shape):
    random = torch.Generator().manual_seed(3)
    return tuple(torch.randn(shape, generator=random, dtype=torch.float64) for _ in "ST")


@EVERY
def test_the_gradient_is_that_of_the_value(name, options, shape, more):
    student, teacher = features(shape)
    loss = MODELS.build({"type": name, **options})
    # WSLD's factor is a weight of the sample, through which no gradient flows: it is checked on its own.
    if name != "WSLD":
        assert torch.autograd.gradcheck(lambda x: loss(x, teacher, *more), student.requires_grad_())
    loss(student.requires_grad_(), teacher, *more).backward()
    assert student.grad.abs().sum() > 0


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_taken_in_fp32(name, options, shape, more, dtype):
    loss = MODELS.build({"type": name, **options})
    rounded = tuple(x.to(dtype) for x in features(shape))
    value = loss(*rounded, *more)
    truth = loss(*(x.double() for x in rounded), *more)
    assert value.dtype == torch.float32 and value.shape == ()
    torch.testing.assert_close(value.double(), truth, rtol=2e-4, atol=2e-6)


@EVERY
def test_the_weight_is_a_factor(name, options, shape, more):
    weight = "alpha_mgd" if name == "MGDLoss" else "loss_weight"
    once, thrice = (MODELS.build({"type": name, **options, weight: factor}) for factor in (1.0, 3.0))
    torch.testing.assert_close(thrice(*features(shape), *more), 3 * once(*features(shape), *more))


def test_every_exported_loss_is_registered_and_tested():
    own = {"CRDLoss", "FBKDLoss", "ActivationLoss", "InformationEntropyLoss", "OnehotLikeLoss"}  # other arguments
    losses = {n for n in distillers.__all__ if "Loss" in n or n in {case[0] for case in CASES}}
    assert losses == own | {case[0] for case in CASES}
    assert all(MODELS.get(f"mmrazor.{name}") is getattr(distillers, name) for name in losses)
