"""Recorders keep what their source saw, leave no trace, and say what is wrong with a source."""

import copy
import gc
import pickle
import weakref

import pytest
import recorded_toy as toy
import torch
from torch import nn

from fastslim import errors
from fastslim.distillers import ModuleOutputsRecorder, RecorderManager


def manager(kind, source, model=None, **options):
    recorders = RecorderManager({"it": {"type": kind, "source": source}}, **options)
    recorders.initialize(model or toy.Net())
    return recorders


@pytest.fixture
def images():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def test_module_outputs_are_recorded_in_order(images):
    net = toy.Net()
    with manager("ModuleOutputs", "block", net) as recorders:
        net(images)
    first = net.block(net.stem(images))
    it = recorders.get_recorder("it")
    assert torch.equal(it.get_record_data(0), first)
    assert torch.equal(it.get_record_data(1), net.block(first))
    assert torch.equal(it.get_record_data(-1), net.block(first))


def test_module_inputs_are_recorded_as_a_tuple(images):
    net = toy.Net()
    with manager("ModuleInputs", "stem", net) as recorders:
        net(images)
    assert recorders.get_recorder("it").get_record_data(0, data_idx=0) is images


def test_the_whole_model_is_a_source(images):
    net = toy.Net()
    with manager("ModuleOutputsRecorder", "", net) as recorders:
        output = net(images)
    assert recorders.get_recorder("it").get_record_data() is output


def test_a_parameter_is_recorded():
    net = toy.Net()
    with manager("Parameter", "head.weight", net) as recorders:
        pass
    assert recorders.get_recorder("it").get_record_data() is net.head.weight


def test_function_outputs_and_inputs_are_recorded_with_defaults(images):
    net = toy.Net()
    outputs = manager("FunctionOutputs", "recorded_toy.scale", net)
    inputs = manager("FunctionInputs", "recorded_toy.scale", net)
    with outputs, inputs:
        net(images)
    x, factor, shift = inputs.get_recorder("it").get_record_data()
    assert (factor, shift) == (2.0, 1.0)
    assert torch.equal(outputs.get_recorder("it").get_record_data(), toy.scale(x, factor, shift=shift))


@pytest.mark.parametrize("source", ["Pool.mean", "SmallPool.mean"])
def test_method_outputs_and_inputs_are_recorded_without_self(images, source):
    outputs, inputs = (manager(kind, f"recorded_toy.{source}") for kind in ("MethodOutputs", "MethodInputs"))
    with outputs, inputs:
        result = toy.SmallPool().mean(images)
    assert outputs.get_recorder("it").get_record_data() is result
    recorded, dim = inputs.get_recorder("it").get_record_data()
    assert recorded is images and dim == 1
    assert "mean" not in vars(toy.SmallPool) and toy.Pool.mean.__qualname__ == "Pool.mean"


def test_static_and_class_methods_stay_what_they_are(images):
    static = manager("MethodInputs", "recorded_toy.Pool.double")
    of_class = manager("MethodInputs", "recorded_toy.Pool.name")
    with static, of_class:
        assert torch.equal(toy.Pool.double(images), 2 * images)
        assert toy.Pool.name(images) == "Pool"
    for recorders in (static, of_class):
        (recorded,) = recorders.get_recorder("it").get_record_data()
        assert recorded is images
    assert isinstance(vars(toy.Pool)["double"], staticmethod) and isinstance(vars(toy.Pool)["name"], classmethod)


def test_nothing_stays_behind_after_an_error(images):
    net, function = toy.Net(), toy.scale
    module, call = manager("ModuleOutputs", "stem", net), manager("FunctionOutputs", "recorded_toy.scale", net)
    with module, call:
        assert net.stem._forward_hooks and toy.scale is not function
    with pytest.raises(RuntimeError, match="shapes"), module, call:
        net(images[:, :1])
    assert not net.stem._forward_hooks and toy.scale is function
    with module, call:  # and both can be used again
        net(images)


def test_nothing_is_recorded_outside_and_entering_starts_anew(images):
    net = toy.Net()
    recorders = manager("ModuleOutputs", "stem", net)
    with recorders:
        net(images)
    net(images)
    assert len(recorders.get_recorder("it").data_buffer) == 1
    with recorders:
        net(images[:2])
    assert [len(x) for x in recorders.get_recorder("it").data_buffer] == [2]


def test_a_teacher_is_recorded_without_its_graph(images):
    net = nn.Sequential(toy.Net())
    net.append(Split())
    recorders = manager("ModuleOutputs", "1", net, detach=True)
    with recorders:
        net(images)
    record = recorders.get_recorder("it").get_record_data()
    assert not record["parts"][0].requires_grad and not record["parts"][1][0].requires_grad
    assert record["name"] == "split"


class Split(nn.Module):
    def forward(self, x):
        return {"parts": (x[:, :1], [x[:, 1:]]), "name": "split"}


def test_cleared_records_free_the_graph(images):
    net = toy.Net()
    recorders = manager("ModuleOutputs", "stem", net)
    with recorders:
        net(images)
    record = weakref.ref(recorders.get_recorder("it").data_buffer[0])
    recorders.clear()
    gc.collect()
    assert record() is None


def test_a_prepared_model_can_be_copied_and_pickled_with_its_recorders(images):
    net = toy.Net()
    recorders = manager("ModuleOutputs", "stem", net)
    with recorders:
        net(images)  # the record holds a graph, which cannot be copied
    for other, others in (copy.deepcopy((net, recorders)), pickle.loads(pickle.dumps((net, recorders)))):
        assert others.get_recorder("it").data_buffer == []
        with others:
            other(images)
        assert len(others.get_recorder("it").data_buffer) == 1
        assert len(recorders.get_recorder("it").data_buffer) == 1


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("ModuleOutputs", "blok", "Net has no module of this name; did you mean 'block'"),
        ("Parameter", "head.wieght", "did you mean 'head.weight'"),
        ("FunctionOutputs", "recorded_toy.scaled", "did you mean 'scale'"),
        ("FunctionOutputs", "no_such_package.f", "there is no module 'no_such_package'"),
        ("FunctionOutputs", "recorded_toy.Pool.mean", "is a method of Pool; use the type that starts with 'M"),
        ("MethodInputs", "recorded_toy.scale", "at least two dots.* use the type that starts with 'Function'"),
        ("MethodInputs", "torch.nn.functional.relu", "is a function of a module; use the type that starts with 'F"),
        ("ModuleOuputs", "block", "did you mean 'ModuleOutputsRecorder'"),
        ("KLDivergence", "block", "did you mean|known"),
    ],
)
def test_a_wrong_source_names_the_fix(kind, source, message):
    with pytest.raises(errors.FastslimValueError, match=message):
        manager(kind, source)


def test_wrong_use_names_the_fix(images):
    with pytest.raises(errors.FastslimTypeError, match="should be a dict from name to recorder, but got list"):
        RecorderManager([ModuleOutputsRecorder("stem")])
    with pytest.raises(errors.FastslimTypeError, match="a Recorder or its config, but got int"):
        RecorderManager({"it": 3})
    with pytest.raises(errors.FastslimTypeError, match="source should be a name"):
        ModuleOutputsRecorder(nn.Linear(1, 1))
    recorders = RecorderManager({"it": ModuleOutputsRecorder("stem")})
    with pytest.raises(errors.FastslimRuntimeError, match="prepare_from_student"), recorders:
        pass
    net = toy.Net()
    recorders.initialize(net)
    it = recorders.get_recorder("it")
    with pytest.raises(errors.FastslimRuntimeError, match="has recorded nothing"):
        it.get_record_data()
    with recorders:
        with pytest.raises(errors.FastslimRuntimeError, match="recording already"), recorders:
            pass
        net(images)
    with pytest.raises(errors.FastslimValueError, match="length of data_buffer is 1, but record_idx is 1"):
        it.get_record_data(1)
    with pytest.raises(errors.FastslimTypeError, match="leave data_idx out"):
        it.get_record_data(0, data_idx=0)
    with pytest.raises(errors.FastslimValueError, match="did you mean 'it'"):
        recorders.get_recorder("itt")
