"""SelfDistiller as MMRazor 0.x configures it, and BYOTDistiller."""

import copy

import pytest
import recorded_toy as toy
import torch
from torch import nn
from torch.nn import functional as F

from fastslim import errors
from fastslim.distillers import BYOTDistiller, ConfigurableDistiller, SelfDistiller
from fastslim.registry import MODELS

KD = {"type": "KLDivergence", "name": "loss_kd", "tau": 1, "loss_weight": 1}


def component(student="head", teacher="head", losses=(KD,)):
    return {"student_module": student, "teacher_module": teacher, "losses": list(losses)}


class Images(nn.Module):
    """The toy, called as MMRazor calls a network."""

    def __init__(self):
        super().__init__()
        self.net = toy.Net()

    def forward(self, img, scale=1.0):
        return self.net(scale * img)


@pytest.fixture
def images():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def kl(student, teacher, tau=1.0):
    return tau**2 * F.kl_div(
        F.log_softmax(student / tau, 1), F.softmax(teacher.detach() / tau, 1), reduction="batchmean"
    )


def test_the_seeds_config_gives_the_seeds_key(images):
    distiller = MODELS.build({"type": "mmrazor.SelfDistiller", "components": [component("net.head", "net.head")]})
    assert isinstance(distiller, ConfigurableDistiller)
    net = Images()
    distiller.prepare_from_student(net)
    teacher = distiller.exec_teacher_forward(net, {"img": images})
    student = distiller.exec_student_forward(net, {"img": images, "scale": 0.5})
    losses = distiller.compute_distill_loss({"img": images})
    assert list(losses) == ["loss_kd.0"]
    torch.testing.assert_close(losses["loss_kd.0"], kl(student, teacher))
    losses["loss_kd.0"].backward()
    ours = net.net.stem.weight.grad.clone()
    net.zero_grad()
    kl(net(0.5 * images), net(images)).backward()
    torch.testing.assert_close(ours, net.net.stem.weight.grad)
    assert distiller.recorded_modules == {"net.head"} and not distiller.needs_own_forward


@pytest.mark.filterwarnings("ignore:Warning. If l2")
def test_the_number_says_which_call_is_compared(images):
    feature = {"type": "L1Loss", "name": "loss_feature", "loss_weight": 2.0}
    distiller = SelfDistiller([component(), component("block", "block", [feature, {"type": "L2Loss", "name": "l2"}])])
    net = toy.Net()
    distiller.prepare_from_student(net)
    with distiller.teacher_pass():
        net(images)
    with distiller.student_pass():
        net(images / 2)
    losses = distiller.compute_distill_losses()
    assert set(losses) == {"loss_kd.0", "loss_feature.0", "loss_feature.1", "l2.0", "l2.1"}
    second = [net.block(net.block(net.stem(x))) for x in (images / 2, images)]
    torch.testing.assert_close(losses["loss_feature.1"], 2 * (second[0] - second[1]).abs().mean())
    assert distiller.losses is distiller.distill_losses
    assert copy.deepcopy(distiller).components == distiller.components


def test_student_and_teacher_may_be_different_modules(images):
    distiller = SelfDistiller([component("block", "stem", [{"type": "L1Loss", "name": "loss"}])])
    net = nn.Sequential()
    net.stem, net.block = nn.Linear(4, 4), nn.Linear(4, 4)
    distiller.prepare_from_student(net)
    with distiller.teacher_pass(), distiller.student_recorders:
        expected = (net.block(images) - net.stem(images)).abs().mean()
    torch.testing.assert_close(distiller.compute_distill_losses()["loss.0"], expected)


def test_a_loss_sees_the_batch(images):
    class Labelled(nn.Module):
        current_data = None

        def forward(self, student, teacher):
            return (student - teacher).sum() * self.current_data["weight"]

    distiller = SelfDistiller([component(losses=[{"type": Labelled, "name": "loss"}])])
    net = toy.Net()
    distiller.prepare_from_student(net)
    teacher, student = (
        distiller.exec_teacher_forward(net, {"x": images}),
        distiller.exec_student_forward(net, {"x": -images}),
    )
    loss = distiller.compute_distill_loss({"weight": 3.0})["loss.0"]
    torch.testing.assert_close(loss, 3 * (student - teacher).sum())
    assert distiller.losses["loss"].current_data is None


def test_what_did_not_run_is_named(images):
    distiller = SelfDistiller([component("block", "head")])
    net = toy.Net()
    with pytest.raises(errors.FastslimRuntimeError, match="prepare_from_student"):
        distiller.exec_student_forward(net, {"x": images})
    distiller.prepare_from_student(net)
    with pytest.raises(errors.FastslimRuntimeError, match=r"ModuleOutputsRecorder\('block'\) has recorded nothing"):
        distiller.compute_distill_losses()
    distiller.exec_teacher_forward(net, {"x": images})
    distiller.exec_student_forward(net, {"x": images})
    with pytest.raises(errors.FastslimRuntimeError, match=r"'block' ran 2 time.s. in the student and 'head' 1 time"):
        distiller.compute_distill_losses()
    with pytest.raises(errors.FastslimValueError, match="did you mean 'head'"):
        SelfDistiller([component("hed", "head")]).prepare_from_student(net)


@pytest.mark.parametrize(
    ("components", "error", "message"),
    [
        (None, TypeError, r"components should be a list with at least one dict\(student_module=..., "),
        ([], TypeError, "components should be a list with at least one"),
        ({"student_module": "fc"}, TypeError, "components should be a list"),
        (["head"], TypeError, r"components\[0\] should be a dict, but got str"),
        ([component(), {"student_module": "fc"}], ValueError, r"components\[1\] needs 'teacher_module'"),
        ([component() | {"loss": []}], ValueError, "has no key 'loss': did you mean 'losses'"),
        ([component() | {"losses": KD}], TypeError, "losses should be a list of dicts"),
        ([component(losses=[{"type": "KLDivergence"}])], ValueError, "a loss needs a 'name'"),
        ([component(), component("block", "block")], ValueError, "two losses are called 'loss_kd'"),
        ([component(losses=[{"type": "KLDivergense", "name": "loss"}])], ValueError, "did you mean 'KLDivergence'"),
        ([component(student=3)], TypeError, "source should be a name"),
    ],
)
def test_a_misconfiguration_names_the_fix(components, error, message):
    with pytest.raises(error, match=message) as raised:
        SelfDistiller(components)
    assert isinstance(raised.value, errors.FastslimError)


def test_a_name_without_loss_is_warned_of():
    with pytest.warns(UserWarning, match="call it 'loss_kd'"):
        SelfDistiller([component(losses=[KD | {"name": "kd"}])])


@pytest.mark.parametrize(("kind", "detached"), [(BYOTDistiller, True), (ConfigurableDistiller, False)])
def test_be_your_own_teacher_detaches_what_a_connector_makes(images, kind, detached):
    stem = {"type": "ModuleOutputs", "source": "stem"}
    distiller = kind({"f": stem}, {"f": stem}, connectors={"c": nn.Linear(8, 8)})
    net = toy.Net()
    distiller.prepare_from_student(net)
    distiller.prepare_from_teacher(net)
    with distiller.teacher_pass():
        net(images)
    with distiller.student_pass():
        net(images)
    assert distiller.get_record("f", True, connector="c").requires_grad
    assert distiller.get_record("f", False, connector="c").requires_grad != detached
