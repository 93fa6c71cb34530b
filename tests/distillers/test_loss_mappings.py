"""What may be given for losses, connectors and mappings, and the errors that MMRazor's callers catch."""

import copy

import pytest
import recorded_toy as toy
import torch
from torch import nn

from fastslim import errors
from fastslim.distillers import BYOTDistiller, ConfigurableDistiller, KLDivergence, ModuleOutputsRecorder

HEAD = {"type": "ModuleOutputs", "source": "head"}
CONFIG = {
    "student_recorders": {"fc": HEAD},
    "teacher_recorders": {"fc": HEAD},
    "distill_losses": {"loss_kl": {"type": "KLDivergence"}},
    "loss_forward_mappings": {
        "loss_kl": {
            "preds_S": {"recorder": "fc", "from_student": True},
            "preds_T": {"recorder": "fc", "from_student": False},
        }
    },
}
BOTH = pytest.mark.parametrize("kind", [ConfigurableDistiller, BYOTDistiller])


def changed(value, *keys):
    """The config with one entry replaced."""
    config = copy.deepcopy(CONFIG)
    inner = config
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return config


S = ("loss_forward_mappings", "loss_kl", "preds_S")


@BOTH
@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (changed(None, "distill_losses"), AssertionError, '"loss_kl" is not in distill_losses'),
        (changed(["A"], "loss_forward_mappings"), TypeError, "loss_forward_mappings should be a dict"),
        (changed([], *S[:2]), TypeError, "Each item of loss_forward_mappings should be a dict"),
        (changed("", *S, "from_student"), TypeError, "from_student should be a bool instance, but got ''"),
        (changed("fcc", *S, "recorder"), AssertionError, "no student recorder 'fcc'; did you mean 'fc'"),
        (changed("wide", *S, "connector"), AssertionError, "there is no connector 'wide'"),
        (changed({}, *S), AssertionError, "loss_kl.preds_S needs 'recorder'"),
        (changed({"recorder": "fc"}, *S), AssertionError, "loss_kl.preds_S needs 'from_student'"),
        (changed({}, *S[:2], "preds"), AssertionError, "has no argument 'preds'; did you mean 'preds_"),
        (changed({"wide": 3}, "connectors"), AssertionError, "connectors: 'wide' should be a torch.nn.Module"),
        (
            changed({"wide": [3]}, "connectors"),
            AssertionError,
            "connectors: each of 'wide' should be a torch.nn.Module",
        ),
        (changed({"loss_kl": [HEAD]}, "distill_losses"), TypeError, "distill_losses: 'loss_kl' should be a torch.nn"),
    ],
)
def test_a_wrong_mapping_is_also_what_callers_catch(kind, config, error, message):
    with pytest.raises(error, match=message) as raised:
        kind(**config)
    assert isinstance(raised.value, errors.FastslimError)


@BOTH
def test_no_mapping_compares_the_only_records(kind):
    distiller = kind(**changed(None, "loss_forward_mappings"))
    assert distiller.loss_forward_mappings == CONFIG["loss_forward_mappings"]


def test_the_config_is_not_changed():
    config = copy.deepcopy(CONFIG)
    ConfigurableDistiller(**config, init_cfg={"type": "Kaiming"})
    assert config == CONFIG


def test_one_recorder_cannot_serve_both_sides():
    recorder = ModuleOutputsRecorder("head")
    with pytest.raises(errors.FastslimValueError, match="one would overwrite the other: make two"):
        ConfigurableDistiller({"fc": recorder}, {"fc": recorder})
    ConfigurableDistiller({"fc": ModuleOutputsRecorder("head")}, {"fc": ModuleOutputsRecorder("head")})


class Pairs(nn.Module):
    def forward(self, x):
        return x, 2 * x


def test_an_element_is_chosen_with_and_without_a_connector():
    model = nn.Sequential(nn.Linear(4, 4), Pairs())
    pairs = {"pairs": {"type": "ModuleOutputs", "source": "1"}, "x": {"type": "ModuleOutputs", "source": "0"}}
    distiller = ConfigurableDistiller(pairs, connectors={"pairs": Pairs()})
    distiller.prepare_from_student(model)
    with distiller.student_pass():
        x, doubled = model(torch.randn(2, 4))
    assert torch.equal(distiller.get_record("pairs", True, connector_idx=1), doubled)
    assert torch.equal(distiller.get_record("pairs", True, data_idx=1), doubled)
    assert torch.equal(distiller.get_record("x", True, connector="pairs", connector_idx=1), 2 * x)
    with pytest.raises(KeyError, match="^there is no connector 'pair'; did you mean 'pairs'"):
        distiller.get_record("x", True, connector="pair")
    with pytest.raises(KeyError, match="^there is no recorder 'y'"):
        distiller.get_record("y", True)


def test_losses_and_connectors_are_built_by_methods_too():
    distiller = ConfigurableDistiller()
    assert isinstance(distiller.build_distill_losses({"loss": {"type": "KLDivergence"}})["loss"], KLDivergence)
    connectors = distiller.build_connectors(
        {"two": [nn.Linear(4, 4), {"type": "NormConnector", "in_channels": 3, "norm_cfg": {"type": "BN"}}]}
    )
    assert isinstance(connectors["two"], nn.Sequential) and len(connectors["two"]) == 2


def test_copies_of_a_prepared_distiller_share_nothing():
    net, distiller = toy.Net(), ConfigurableDistiller(**CONFIG)
    distiller.prepare_from_student(net)
    distiller.prepare_from_teacher(net)
    other, others = copy.deepcopy((net, distiller))
    with others.teacher_pass(), others.student_recorders:
        other(torch.randn(2, 4))
    assert others.compute_distill_losses()["loss_kl"] == 0
    assert distiller.student_recorders.get_recorder("fc").data_buffer == []
