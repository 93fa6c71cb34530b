"""ConfigurableDistiller brings records to losses as MMRazor users write it, and names what is misconfigured."""

import copy
import gc
import pickle
import weakref

import pytest
import recorded_toy as toy
import torch
from torch import nn
from torch.nn import functional as F

from fastslim import errors
from fastslim.distillers import ConfigurableDistiller, KLDivergence
from fastslim.registry import MODELS

HEAD = {"type": "ModuleOutputs", "source": "head"}


def config(**changes):
    """What MMRazor users write for AutoSlim, on the toy network's head."""
    return {
        "type": "mmrazor.ConfigurableDistiller",
        "teacher_recorders": {"fc": HEAD},
        "student_recorders": {"fc": HEAD},
        "distill_losses": {"loss_kl": {"type": "KLDivergence", "tau": 2.0, "loss_weight": 0.5}},
        "loss_forward_mappings": {
            "loss_kl": {
                "preds_S": {"recorder": "fc", "from_student": True},
                "preds_T": {"recorder": "fc", "from_student": False},
            }
        },
    } | changes


@pytest.fixture
def images():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def distilled(distiller, teacher, student, images):
    distiller.prepare_from_teacher(teacher)
    distiller.prepare_from_student(student)
    distiller.set_deliveries_override(False)
    with distiller.teacher_recorders, distiller.deliveries:
        expected = teacher(images)
    distiller.set_deliveries_override(True)
    with distiller.student_recorders, distiller.deliveries:
        output = student(images)
    return expected, output, distiller.compute_distill_losses()


def kl(student, teacher, tau):
    return tau**2 * F.kl_div(F.log_softmax(student / tau, 1), F.softmax(teacher / tau, 1), reduction="batchmean")


def test_the_seeds_config_gives_the_seeds_loss_and_gradient(images):
    teacher, student = toy.Net(seed=0), toy.Net(seed=1)
    teacher_output, student_output, losses = distilled(MODELS.build(config()), teacher, student, images)
    assert list(losses) == ["loss_kl"]
    torch.testing.assert_close(losses["loss_kl"], 0.5 * kl(student_output, teacher_output.detach(), 2.0))
    losses["loss_kl"].backward()
    ours = student.stem.weight.grad.clone()
    student.zero_grad()
    (0.5 * kl(student(images), teacher(images).detach(), 2.0)).backward()
    torch.testing.assert_close(ours, student.stem.weight.grad)
    assert teacher.stem.weight.grad is None


def test_one_network_is_teacher_and_student_of_itself(images):
    net = toy.Net()
    distiller = MODELS.build(config())
    distiller.prepare_from_teacher(net)
    distiller.prepare_from_student(net)
    with distiller.teacher_pass():
        teacher = net(images)
    for factor in (0.5, 0.25):  # several students of one teacher
        with distiller.student_pass():
            student = net(factor * images)
        loss = distiller.compute_distill_losses()["loss_kl"]
        torch.testing.assert_close(loss, 0.5 * kl(student, teacher.detach(), 2.0))


@pytest.mark.parametrize("loss", [{"type": "KLDivergence"}, KLDivergence(), {"type": nn.MSELoss}], ids=str)
def test_one_recorder_on_each_side_needs_no_mapping(images, loss):
    distiller = ConfigurableDistiller({"a": HEAD}, {"b": HEAD}, distill_losses={"loss": loss})
    teacher, student, losses = distilled(distiller, toy.Net(seed=0), toy.Net(seed=1), images)
    truth = F.mse_loss(student, teacher) if loss == {"type": nn.MSELoss} else kl(student, teacher.detach(), 1.0)
    torch.testing.assert_close(losses["loss"], truth)


def test_connectors_bring_features_of_different_width_together(images):
    stem = {"type": "ModuleOutputs", "source": "stem"}
    distiller = ConfigurableDistiller(
        {"f": stem},
        {"f": stem},
        connectors={"to_teacher": {"type": nn.Linear, "in_features": 4, "out_features": 8}},
        distill_losses={"loss_l1": {"type": "L1Loss"}},
        loss_forward_mappings={
            "loss_l1": {
                "s_feature": {"recorder": "f", "from_student": True, "connector": "to_teacher"},
                "t_feature": {"recorder": "f", "from_student": False},
            }
        },
    )
    assert list(distiller.state_dict()) == ["connectors.to_teacher.weight", "connectors.to_teacher.bias"]
    teacher, student = toy.Net(8), toy.Net(4)
    _, _, losses = distilled(distiller, teacher, student, images)
    connector = distiller.connectors["to_teacher"]
    torch.testing.assert_close(losses["loss_l1"], (connector(student.stem(images)) - teacher.stem(images)).abs().mean())
    losses["loss_l1"].backward()
    assert connector.weight.grad.abs().sum() > 0


def test_several_losses_choose_their_records(images):
    distiller = ConfigurableDistiller(
        student_recorders={"fc": HEAD, "block": {"type": "ModuleInputs", "source": "block"}},
        teacher_recorders={"fc": HEAD, "block": {"type": "ModuleInputs", "source": "block"}},
        distill_losses={"loss_kl": {"type": "KLDivergence"}, "loss_l1": {"type": "L1Loss"}},
        loss_forward_mappings={
            "loss_kl": config()["loss_forward_mappings"]["loss_kl"],
            "loss_l1": {
                "s_feature": {"recorder": "block", "from_student": True, "record_idx": 1, "data_idx": 0},
                "t_feature": {"recorder": "block", "from_student": False, "record_idx": 1, "data_idx": 0},
            },
        },
    )
    teacher, student = toy.Net(seed=0), toy.Net(seed=1)
    _, _, losses = distilled(distiller, teacher, student, images)
    second = [net.block(net.stem(images)) for net in (student, teacher)]
    torch.testing.assert_close(losses["loss_l1"], (second[0] - second[1]).abs().mean())
    assert distiller.recorded_modules == {"head", "block"}
    assert not distiller.needs_own_forward


def test_a_connector_may_return_several_features(images):
    class Halves(nn.Module):
        def forward(self, x):
            return x[:, :4], x[:, 4:]

    stem = {"type": "ModuleOutputs", "source": "stem"}
    distiller = ConfigurableDistiller({"f": stem}, {"f": stem}, connectors={"halves": Halves()})
    net = toy.Net(8)
    distilled(distiller, net, net, images)
    record = distiller.get_record("f", from_student=True, connector="halves", connector_idx=1)
    assert torch.equal(record, net.stem(images)[:, 4:])


def test_deliveries_hand_the_teachers_result_to_every_student(images):
    distiller = ConfigurableDistiller(
        {"fc": HEAD},
        {"fc": HEAD},
        distill_deliveries={"scale": {"type": "FunctionOutputs", "func_path": "recorded_toy.scale"}},
    )
    teacher, student = toy.Net(seed=0), toy.Net(seed=1)
    distilled(distiller, teacher, student, images)
    x = toy.scale(teacher.block(teacher.block(teacher.stem(images))), shift=1.0).detach()
    expected = student.head(x - x.mean(1, keepdim=True))
    assert torch.equal(distiller.get_record("fc", from_student=True), expected)
    with distiller.student_pass():  # the next student starts from the first result again
        assert torch.equal(student(images), expected)
    assert distiller.needs_own_forward


def test_a_method_is_delivered_and_running_too_often_is_named(images):
    distiller = ConfigurableDistiller(
        distill_deliveries={"mean": {"type": "MethodOutputs", "method_path": "recorded_toy.Pool.mean"}}
    )
    pool = toy.SmallPool()
    with distiller.deliveries:
        first = pool.mean(images)
        with pytest.raises(errors.FastslimRuntimeError, match="more than max_keep_data=1 times"):
            pool.mean(images)
    distiller.set_deliveries_override(True)
    with distiller.deliveries:
        assert torch.equal(pool.mean(images + 1), first)
        with pytest.raises(errors.FastslimRuntimeError, match="more often in the student than in the teacher"):
            pool.mean(images)
    assert torch.equal(pool.mean(images + 1), (images + 1).mean(1, keepdim=True))


@pytest.mark.parametrize(
    ("recorder", "own"),
    [
        (HEAD, False),
        ({"type": "Parameter", "source": "head.weight"}, False),
        ({"type": "FunctionInputs", "source": "recorded_toy.scale"}, True),
        ({"type": "ModuleOutputs", "source": ""}, True),
    ],
)
def test_it_says_whether_a_traced_plan_would_hide_a_source(recorder, own):
    assert ConfigurableDistiller(teacher_recorders={"it": recorder}).needs_own_forward is own


def test_cleared_records_free_the_graphs(images):
    distiller = MODELS.build(config())
    net = toy.Net()
    distilled(distiller, net, net, images)
    records = [
        weakref.ref(m.get_recorder("fc").data_buffer[0])
        for m in (distiller.student_recorders, distiller.teacher_recorders)
    ]
    distiller.clear()
    gc.collect()
    assert [record() for record in records] == [None, None]
    with pytest.raises(errors.FastslimRuntimeError, match=r"ModuleOutputsRecorder\('head'\) has recorded nothing"):
        distiller.compute_distill_losses()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_watches_the_copied_network(images, how):
    net = toy.Net()
    distiller = MODELS.build(config())
    distilled(distiller, net, net, images)
    other, others = how((net, distiller))
    with torch.no_grad():
        other.head.weight.zero_()
    with others.teacher_recorders:
        other(images)
    with others.student_recorders:
        other(images + 1)
    for from_student in (True, False):  # with a zero weight the logits are the bias
        assert torch.equal(others.get_record("fc", from_student), other.head.bias.expand(5, 3))
        assert not torch.equal(distiller.get_record("fc", from_student), other.head.bias.expand(5, 3))


def test_no_arguments_make_a_distiller_without_losses(images):
    distiller = ConfigurableDistiller()
    assert distilled(distiller, toy.Net(), toy.Net(), images)[2] == {}
    assert distiller.recorded_modules == set()


def mapping(**record):
    base = {"recorder": "fc", "from_student": True} | record
    return {"loss_kl": {"preds_S": base, "preds_T": {"recorder": "fc", "from_student": False}}}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"distill_losses": {"loss_kl": 3}}, TypeError, "'loss_kl' should be a torch.nn.Module or its config"),
        ({"distill_losses": {"loss.kl": KLDivergence()}}, ValueError, "without dots"),
        ({"distill_losses": [KLDivergence()]}, TypeError, "distill_losses should be a dict"),
        (
            {"distill_losses": {"loss_kd": KLDivergence()}},
            ValueError,
            '"loss_kl" is not in distill_losses.* did you mean .loss_kd',
        ),
        (
            {"distill_losses": {"loss_kl": KLDivergence(), "loss_2": KLDivergence()}},
            ValueError,
            "says nothing about loss_2",
        ),
        (
            {"loss_forward_mappings": mapping(recorder="fcc")},
            ValueError,
            "no student recorder 'fcc'; did you mean 'fc'",
        ),
        ({"loss_forward_mappings": mapping(recoder="fc")}, ValueError, "no key 'recoder': did you mean 'recorder'"),
        ({"loss_forward_mappings": mapping(connector="x")}, ValueError, "there is no connector 'x'"),
        ({"loss_forward_mappings": {"loss_kl": {"preds_S": "fc"}}}, ValueError, "also needs preds_T"),
        (
            {"loss_forward_mappings": {"loss_kl": {"preds_S": "fc", "preds_T": "fc"}}},
            TypeError,
            r"a record should be a dict such as dict\(recorder='fc', from_student=True\), but got 'fc'",
        ),
        (
            {"loss_forward_mappings": {"loss_kl": {"pred_S": {}, "preds_T": {}}}},
            ValueError,
            "KLDivergence.forward of 'loss_kl' has no argument 'pred_S'; did you mean 'preds_S'",
        ),
        ({"loss_forward_mappings": {"loss_kl": {"preds_S": {}, "preds_T": {}}}}, ValueError, "needs 'recorder'"),
        (
            {"student_recorders": {"a": HEAD, "b": HEAD}, "loss_forward_mappings": None},
            ValueError,
            "2 student and 1 teacher recorders .* give loss_forward_mappings",
        ),
        ({"connector": {}}, ValueError, "no argument 'connector': did you mean 'connectors'"),
        ({"distill_deliveries": {"x": {"type": "FunctionOutput"}}}, ValueError, "did you mean 'FunctionOutputsDel"),
    ],
)
def test_a_misconfiguration_names_the_fix(changes, error, message):
    with pytest.raises(error, match=message) as raised:
        MODELS.build(config(**changes))
    assert isinstance(raised.value, errors.FastslimError)
