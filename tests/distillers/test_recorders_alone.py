"""Recorders and managers as MMRazor's callers use them: alone, initialised by hand, with the errors they catch."""

import copy

import pytest
import recorded_toy as toy
import torch

from fastslim import errors
from fastslim.distillers import (
    FunctionInputsRecorder,
    FunctionOutputsRecorder,
    MethodInputsRecorder,
    MethodOutputsRecorder,
    ModuleInputsRecorder,
    ModuleOutputsRecorder,
    ParameterRecorder,
    RecorderManager,
)


@pytest.fixture
def images():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kind", "source"), [(ModuleOutputsRecorder, "head"), (ModuleInputsRecorder, "stem")])
def test_a_module_recorder_records_inside_its_block_only(images, kind, source):
    net, recorder = toy.Net(), kind(source)
    recorder.initialize(net)
    with recorder:
        assert recorder.recording
        output = net(images)
    assert not recorder.recording
    net(images + 1)
    record = recorder.get_record_data() if source == "head" else recorder.get_record_data(data_idx=0)
    assert record is (output if source == "head" else images)
    with recorder:
        assert recorder.data_buffer == []
    assert recorder.data_buffer == []


def test_function_and_method_recorders_need_no_model(images):
    outputs, inputs = FunctionOutputsRecorder("recorded_toy.scale"), FunctionInputsRecorder("recorded_toy.scale")
    means, arguments = MethodOutputsRecorder("recorded_toy.Pool.mean"), MethodInputsRecorder("recorded_toy.Pool.mean")
    for recorder in (outputs, inputs, means, arguments):
        recorder.initialize()
    with outputs, inputs, means, arguments:
        calls = [toy.scale(images, 3.0), toy.scale(images, factor=3.0), toy.scale(factor=3.0, x=images)]
        mean = toy.Pool().mean(dim=0, x=images)
    toy.scale(images)
    assert outputs.data_buffer == calls
    assert all(inputs.get_record_data(i, 0) is images and inputs.get_record_data(i, 1) == 3.0 for i in range(3))
    assert means.get_record_data() is mean
    assert arguments.get_record_data(data_idx=0) is images and arguments.get_record_data(data_idx=1) == 0


def test_a_parameter_is_there_before_anything_runs(images):
    net, recorder = toy.Net(), ParameterRecorder("head.bias")
    recorder.initialize(net)
    assert recorder.get_record_data() is net.head.bias
    with recorder:
        net(images)
    recorder.reset_data_buffer()
    assert recorder.get_record_data() is net.head.bias
    other, others = copy.deepcopy((net, recorder))
    assert others.get_record_data() is other.head.bias is not net.head.bias


def test_a_manager_initialises_all_its_recorders(images):
    manager = RecorderManager(
        {
            "module": {"type": "ModuleOutputs", "source": "head"},
            "method": {"type": "MethodOutputs", "source": "recorded_toy.Pool.mean"},
        }
    )
    net = toy.Net()
    manager.initialize(net)
    assert manager.get_recorder("module") is manager.recorders["module"]
    with manager:
        output = net(images)
    assert manager.recorders["module"].get_record_data() is output
    assert manager.recorders["method"].get_record_data().shape == (5, 1)
    assert len(RecorderManager().recorders) == 0
    with RecorderManager():
        net(images)


def test_an_index_out_of_range_is_an_assertion():
    recorder = MethodOutputsRecorder("recorded_toy.Pool.double")
    recorder.initialize()
    with recorder:
        toy.Pool.double(1)
        toy.Pool.double([1, 2])
    with pytest.raises(
        AssertionError, match="record_idx is illegal. The length of data_buffer is 2, but record_idx is 2"
    ):
        recorder.get_record_data(record_idx=2)
    with pytest.raises(TypeError, match="When data_idx is not None, record should be a list or tuple instance"):
        recorder.get_record_data(data_idx=0)
    with pytest.raises(AssertionError, match="data_idx is illegal. The length of record is 4"):
        recorder.get_record_data(record_idx=1, data_idx=4)
    assert recorder.get_record_data(record_idx=1, data_idx=3) == 2
    recorder.reset_data_buffer()
    with pytest.raises(AssertionError, match="record_idx is illegal. The length of data_buffer is 0"):
        recorder.get_record_data()


def outputs_of(source):
    return lambda: FunctionOutputsRecorder(source)


def method(source):
    return lambda: MethodOutputsRecorder(source)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (outputs_of([1]), TypeError, "source should be an import path"),
        (outputs_of("scale"), AssertionError, "source must have at least one dot"),
        (method([1]), TypeError, "source should be an import path"),
        (method("mean"), AssertionError, "source must have at least two dots"),
        (method("Pool.mean"), AssertionError, "source must have at least two dots"),
        (method("nowhere.Pool.mean"), ImportError, "nowhere is not imported"),
        (method("recorded_toy.Pol.mean"), AssertionError, "Pol is not in recorded_toy; did you mean 'Pool'"),
        (method("recorded_toy.scale.mean"), TypeError, "scale should be a type"),
        (method("recorded_toy.Pool.maen"), AssertionError, "maen is not in Pool; did you mean 'mean'"),
        (method("recorded_toy.Net.__doc__"), TypeError, "__doc__ should be a function"),
        (lambda: ModuleOutputsRecorder("head").prepare_from_model(), AssertionError, "model can not be None"),
        (lambda: ParameterRecorder("head").prepare_from_model(), AssertionError, "model can not be None"),
        (lambda: ModuleOutputsRecorder("hed").initialize(toy.Net()), AssertionError, '"hed" is not in the model'),
        (lambda: ParameterRecorder("hed").initialize(toy.Net()), AssertionError, '"hed" is not in the model'),
        (lambda: RecorderManager().get_recorder("it"), KeyError, "^there is no recorder 'it'"),
    ],
)
def test_errors_are_also_those_that_callers_catch(make, error, message):
    with pytest.raises(error, match=message) as raised:
        make()
    assert isinstance(raised.value, errors.FastslimError)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("nowhere.scale", ImportError, "nowhere is not imported"),
        ("recorded_toy.scael", AssertionError, "scael is not in recorded_toy; did you mean 'scale'"),
        ("recorded_toy.torch", TypeError, "torch should be a function"),
        ("recorded_toy.Net", TypeError, "Net should be a function"),
    ],
)
def test_a_function_alone_is_looked_up_when_recorded_and_in_a_distiller_before(source, error, message):
    recorder = FunctionOutputsRecorder(source)
    recorder.initialize()
    with pytest.raises(error, match=message), recorder:
        pass
    assert not recorder.recording
    with pytest.raises(error, match=message):
        recorder.initialize(toy.Net())


def test_a_module_that_cannot_import_what_it_needs_is_not_taken_for_absent(tmp_path, monkeypatch):
    (tmp_path / "needs_nothing_real.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="is not imported correctly: No module named 'not_there"):
        MethodOutputsRecorder("needs_nothing_real.Pool.mean")


def test_wrong_use_of_a_recorder_names_the_fix():
    recorder = ModuleOutputsRecorder("head")
    with pytest.raises(AssertionError, match=r"call recorder.initialize\(model\)"), recorder:
        pass
    recorder.initialize(toy.Net())
    with recorder, pytest.raises(errors.FastslimRuntimeError, match="is recording already"), recorder:
        pass
