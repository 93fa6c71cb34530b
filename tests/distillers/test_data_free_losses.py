"""Losses of a teacher alone, against their formulas."""

import math

import pytest
import torch

from fastslim import errors
from fastslim.distillers import ActivationLoss, InformationEntropyLoss, OnehotLikeLoss


@pytest.fixture
def logits():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


def test_a_sure_prediction_is_like_one_hot(logits):
    truth = 2 * sum(-row.softmax(0).max().log() for row in logits) / 4
    torch.testing.assert_close(OnehotLikeLoss(loss_weight=2.0)(logits), truth)
    assert OnehotLikeLoss()(100 * logits) < 1e-3


@pytest.mark.parametrize("gather", [True, False])
def test_the_entropy_of_the_mean_prediction_is_in_digits(logits, gather):
    mean = sum(row.softmax(0) for row in logits) / 4
    truth = 2 * sum(p * math.log10(p) for p in mean.tolist())
    torch.testing.assert_close(InformationEntropyLoss(gather, 2.0)(logits), torch.tensor(truth, dtype=torch.float64))
    balanced = InformationEntropyLoss()(1000 * torch.eye(6))
    torch.testing.assert_close(balanced, torch.tensor(-math.log10(6)))
    certain = torch.zeros(4, 6).index_fill(1, torch.tensor([2]), 1000.0)  # a class that never appears adds nothing
    assert InformationEntropyLoss()(certain) == 0


def test_gathering_needs_a_process_group(logits):
    loss = InformationEntropyLoss()
    loss.world_size = 2
    with pytest.raises(RuntimeError, match="Default process group has not been initialized"):
        loss(logits)


def entropy_of_a_process(rank, rendezvous, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    own = logits_of(rank)
    loss = InformationEntropyLoss()(own)
    loss.backward()
    torch.save({"loss": loss.detach(), "gradient": own.grad}, f"{results}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def logits_of(rank):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).requires_grad_()


def test_the_mean_prediction_is_that_of_all_processes(tmp_path):
    torch.multiprocessing.spawn(entropy_of_a_process, (tmp_path / "rendezvous", tmp_path), nprocs=2)
    both = [logits_of(0), logits_of(1)]
    truth = InformationEntropyLoss(gather=False)(torch.cat(both))
    # The loss is there twice, once in each process, and data parallelism takes the mean.
    gradients = torch.autograd.grad(2 * truth, both)
    for rank in (0, 1):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(result["loss"], truth.detach())
        torch.testing.assert_close(result["gradient"], gradients[rank])


def test_active_features_have_a_small_loss(logits):
    torch.testing.assert_close(ActivationLoss(2.0)(logits), -2 * logits.abs().sum() / 24)
    torch.testing.assert_close(ActivationLoss(norm_type="norm")(logits), -logits.square().sum().sqrt())
    with pytest.raises(errors.FastslimValueError, match='"norm_type" must be "norm" or "abs"') as raised:
        ActivationLoss(norm_type="random")
    assert isinstance(raised.value, AssertionError)
