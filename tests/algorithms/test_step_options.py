"""Every option of a step equals a loop written by hand, in float64: losses, gradients, running statistics."""

from __future__ import annotations

import plain_loop
import pytest
import torch
import torch.nn.functional as F
from test_exactness import assert_equal_to_rounding, gradients, make, statistics, subnets_of_next_step
from torch import Tensor


def distiller(source: str, **loss: object) -> dict:
    kind = loss.pop("kind", "KLDivergence")
    recorder = dict(fc=dict(type="ModuleOutputs", source=source))
    return dict(
        type="ConfigurableDistiller",
        teacher_recorders=recorder,
        student_recorders=recorder,
        distill_losses=dict(loss_kl=dict(type=kind, **loss)),
        loss_forward_mappings=dict(
            loss_kl=dict(
                preds_S=dict(recorder="fc", from_student=True), preds_T=dict(recorder="fc", from_student=False)
            )
        ),
    )


def soft_loss(student: Tensor, teacher: Tensor, tau: float, reduction: str, weight: float, kind: str) -> Tensor:
    target, log_student = F.softmax(teacher / tau, 1), F.log_softmax(student / tau, 1)
    if kind == "KDSoftCELoss":
        return weight * tau**2 * -(target * log_student).sum(1).mean()
    terms = F.kl_div(log_student, target, reduction="none")
    total = {"batchmean": terms.sum() / len(terms), "sum": terms.sum(), "mean": terms.mean()}[reduction]
    return weight * tau**2 * total


def plain_step(algo, plain, images, labels, *, kind="KLDivergence", tau=1.0, reduction="batchmean", weight=1.0):
    """The passes of `algo`'s next step by hand; gradients in `plain`, losses by name."""
    net, losses, teacher = plain_loop.Net(plain), {}, None
    widths = subnets_of_next_step(algo)
    scale = 1.0 / len(widths) if algo.grad_reduction == "mean" else 1.0
    names = ["max_subnet", "min_subnet", *(f"random_subnet_{i}" for i in range(algo.num_samples))]
    for name, net.widths in zip(names, widths, strict=True):
        logits = plain_loop.concat_net(net, images)
        own = {}
        if teacher is None or algo.student_loss == "ce+kd":
            own["loss"] = F.cross_entropy(logits, labels)
        if teacher is not None:
            own["loss_kl"] = soft_loss(logits, teacher, tau, reduction, weight, kind)
        teacher = logits.detach() if teacher is None else teacher
        (scale * sum(own.values())).backward()
        losses.update({f"{name}.{key}": value.detach() for key, value in own.items()})
    return losses


@pytest.mark.parametrize("norm_training", [False, True], ids=["", "norm_training"])
@pytest.mark.parametrize("grad_reduction", ["sum", "mean"])
@pytest.mark.parametrize("student_loss", ["kd", "ce+kd"])
@pytest.mark.parametrize(
    "loss",
    [
        None,
        dict(tau=1.0),
        dict(tau=4.0, loss_weight=0.5),
        dict(tau=2.0, reduction="sum"),
        dict(tau=0.5, reduction="mean", loss_weight=3.0),
        dict(kind="KDSoftCELoss", tau=3.0),
    ],
    ids=lambda loss: "default" if loss is None else "-".join(map(str, loss.values())),
)
def test_every_option_equals_the_plain_loop(loss, student_loss, grad_reduction, norm_training) -> None:
    own = {} if loss is None else {"distiller": distiller("fc", **loss)}
    algo, plain, images, labels = make(
        "concat",
        torch.float64,
        "nchw",
        student_loss=student_loss,
        grad_reduction=grad_reduction,
        norm_training=norm_training,
        num_random_samples=1,
        **own,
    )
    plain_options = {("weight" if k == "loss_weight" else k): v for k, v in (loss or {}).items()}
    expected = plain_step(algo, plain, images, labels, **plain_options)
    losses = algo.accumulate((images, labels))
    assert losses.keys() == expected.keys()
    assert_equal_to_rounding(losses, expected)
    assert_equal_to_rounding(gradients(algo.architecture), gradients(plain))
    assert_equal_to_rounding(statistics(algo.architecture), statistics(plain))


def test_norm_training_normalises_by_the_batch_in_evaluation() -> None:
    algo, plain, images, _ = make("concat", torch.float64, "nchw", bn_training_mode=True)
    net = plain_loop.Net(plain)
    net.widths = subnets_of_next_step(algo)[1]
    algo.eval().set_min_subnet()
    torch.testing.assert_close(algo(images), plain_loop.concat_net(net, images), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("option", "passes"), [("num_samples", 3), ("num_random_samples", 3), ("num_sample_training", 5)]
)
def test_random_subnets_have_three_names(option, passes) -> None:
    algo, *_ = make("concat", torch.float64, "nchw", **{option: passes})
    assert list(algo.subnets_of_step()) == ["max_subnet", "min_subnet", *(f"random_subnet_{i}" for i in range(3))]


@pytest.mark.parametrize("options", [dict(num_samples=-1), dict(num_sample_training=1), dict(num_samples=True)])
def test_an_impossible_number_of_random_subnets_is_refused(options) -> None:
    with pytest.raises(ValueError, match="must be 0 or a positive integer"):
        make("concat", torch.float64, "nchw", **options)
